"""How long a silent store is asked again, and what is said meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from fusion import log
from fusion.storage.backend import store_of
from fusion.storage.errors import is_silence, is_unreachable, reason_of

T = TypeVar("T")

# Seconds for a store where nothing listens and that this process has not spoken to yet: more likely a wrong address
# than an outage. Not less, for the network of a new pod comes up some seconds after its processes.
FIRST_PATIENCE = 10.0
QUIET = 3.0  # seconds of silence before the log says what is waited for; shorter ones are of no interest
REMINDER = 60.0  # seconds between two such lines

_PAUSES = wait_random_exponential(0.2, max=5)  # seconds; random, so that many ranks do not come back at once
_known: set[str] = set()  # stores that have answered this process
_lock = threading.Lock()
_last_said = float("-inf")


def persistently(url: str, action: Callable[[], T], patience: float) -> T:
    """Result of `action`, tried again while the store is silent, for `patience` seconds after the first failure."""
    store, silence = store_of(url), _Silence(url, patience)

    def attempt() -> T:
        try:
            result = action()
        except Exception as error:
            if not is_silence(error):
                _known.add(store)
            raise
        _known.add(store)
        return result

    attempts = Retrying(
        stop=silence.is_over,
        wait=lambda state: min(_PAUSES(state), silence.left(state)),
        retry=retry_if_exception(is_silence),
        reraise=True,
    )
    return attempts(attempt)


class _Silence:
    """The time since the first failure: what a large object took before it does not count."""

    def __init__(self, url: str, patience: float) -> None:
        self._url, self._patience, self._began = url, patience, 0.0

    def is_over(self, state: RetryCallState) -> bool:
        self._began = self._began or time.monotonic()
        error, patience = _error(state), self._patience_with(state)
        lasting = time.monotonic() - self._began
        if error is not None and QUIET <= lasting < patience:
            _say(self._url, error, patience)
        return lasting >= patience

    def left(self, state: RetryCallState) -> float:
        """Seconds until it is over."""
        return max(0.0, self._began + self._patience_with(state) - time.monotonic())

    def _patience_with(self, state: RetryCallState) -> float:
        error = _error(state)
        if error is not None and is_unreachable(error) and store_of(self._url) not in _known:
            return min(self._patience, FIRST_PATIENCE)
        return self._patience


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _say(url: str, error: BaseException, patience: float) -> None:
    """Warns of the silence, unless a line about some store's has just been written."""
    global _last_said  # noqa: PLW0603 (all threads of a process wait together)
    with _lock:
        if time.monotonic() - _last_said < REMINDER:
            return
        _last_said = time.monotonic()
    log.warning(event="waiting", store=url, reason=reason_of(error), trying_for=f"{patience:g} s")
