"""Stop requests: a signal sets a flag, a command reads it between steps or parts, keeps what is done, ends with 75."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What Kubernetes and Slurm send before they kill, a terminal's Ctrl-C, what users of Slurm's --signal choose, and what
# a terminal that is closed or an ssh connection that is lost sends.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_received: list[int] = []


def requested() -> bool:
    """Whether this process was asked to stop."""
    return bool(_received)


@contextmanager
def listening() -> Iterator[None]:
    """Inside, a stop signal is remembered instead of killing the process; a second Ctrl-C is a KeyboardInterrupt."""
    _received.clear()
    before = catch(_remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def catch(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Gives every stop signal this handler, and returns those before; a SIGHUP that nohup ignores stays ignored."""
    wanted = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _remember(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
