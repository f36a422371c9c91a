"""Stop requests: a signal sets a flag, a command reads it between steps or parts, keeps what is done, ends with 75."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What Kubernetes and Slurm send before they kill, a terminal's Ctrl-C, and what users of Slurm's --signal choose.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_received: list[int] = []


def requested() -> bool:
    """Whether this process was asked to stop."""
    return bool(_received)


@contextmanager
def listening() -> Iterator[None]:
    """Inside, a stop signal is remembered instead of killing the process; a second Ctrl-C is a KeyboardInterrupt."""
    _received.clear()
    before = {number: signal.signal(number, _remember) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remember(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
