"""Retries requests to a store that does not answer, and warns while it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from fusion import log
from fusion.storage.backend import store_of
from fusion.storage.errors import is_transient, is_unreachable, reason_of

T = TypeVar("T")

# Seconds of retries if nothing listens at the store's address, and the store has never answered this process. Then a
# wrong address is more likely than an outage, so the user should hear of it soon. But a new pod's network may come up
# some seconds after its processes start, so it must not be much shorter.
FIRST_PATIENCE = 10.0
QUIET = 3.0  # seconds of retries before the first warning; shorter interruptions are common and harmless
REMINDER = 60.0  # seconds between two warnings

# Seconds between two tries: exponential up to 5, and random, so that many ranks do not retry all at once.
_PAUSES = wait_random_exponential(0.2, max=5)
_known: set[str] = set()  # stores that have answered this process at least once
_lock = threading.Lock()
_last_said = float("-inf")


def with_retries(url: str, action: Callable[[], T], patience: float) -> T:
    """Runs `action`, and retries it after transient errors until `patience` seconds after the first one."""
    store, outage = store_of(url), _Outage(url, patience)

    def attempt() -> T:
        try:
            result = action()
        except Exception as error:
            if not is_transient(error):  # the store has answered, if only with an error
                _known.add(store)
            raise
        _known.add(store)
        return result

    attempts = Retrying(
        stop=outage.is_too_long,
        wait=lambda state: min(_PAUSES(state), outage.seconds_left(state)),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )
    return attempts(attempt)


class _Outage:
    """Measures the time since the first failure, and warns while it lasts.

    tenacity's own limits count from the start of the first try, so a large object that takes long to read would use up
    the time for retries.
    """

    def __init__(self, url: str, patience: float) -> None:
        self._url, self._patience, self._began = url, patience, 0.0

    def is_too_long(self, state: RetryCallState) -> bool:
        self._began = self._began or time.monotonic()
        error, patience = _error(state), self._patience_with(state)
        lasting = time.monotonic() - self._began
        if error is not None and QUIET <= lasting < patience:
            _warn(self._url, error, patience)
        return lasting >= patience

    def seconds_left(self, state: RetryCallState) -> float:
        """Seconds until the last try."""
        return max(0.0, self._began + self._patience_with(state) - time.monotonic())

    def _patience_with(self, state: RetryCallState) -> float:
        error = _error(state)
        if error is not None and is_unreachable(error) and store_of(self._url) not in _known:
            return min(self._patience, FIRST_PATIENCE)
        return self._patience


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _warn(url: str, error: BaseException, patience: float) -> None:
    """Warns that the store does not answer, unless there was such a warning in the last `REMINDER` seconds."""
    global _last_said  # noqa: PLW0603 (all threads of a process wait together)
    with _lock:
        if time.monotonic() - _last_said < REMINDER:
            return
        _last_said = time.monotonic()
    log.warning(event="waiting", store=url, reason=reason_of(error), trying_for=f"{patience:g} s")
