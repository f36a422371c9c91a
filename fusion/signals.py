"""Stop requests. A signal sets a flag; a command checks it between steps, commits what is done, and exits with 75."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SIGTERM: Kubernetes and Slurm send it before they kill. SIGINT: Ctrl-C. SIGUSR1, SIGUSR2: users choose them with
# Slurm's --signal. SIGHUP: sent when a terminal is closed or an ssh connection is lost.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_received: list[int] = []


def requested() -> bool:
    """Whether this process was asked to stop."""
    return bool(_received)


@contextmanager
def listening() -> Iterator[None]:
    """Inside the block, a stop signal is only recorded; a second Ctrl-C raises KeyboardInterrupt."""
    _received.clear()
    before = catch(_remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()  # the process may go on, as that of a notebook does, and must not stop its next work


def catch(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Sets the handler of every stop signal, and returns the previous ones. A SIGHUP ignored by nohup stays ignored."""
    wanted = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _remember(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
