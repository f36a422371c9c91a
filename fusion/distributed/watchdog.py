"""Ends a rank that makes no progress: dumps the stacks of all threads, says and records it, then leaves with 124."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fusion import log
from fusion.command.exit import leave
from fusion.errors import StalledError
from fusion.streams import LOST


class Watchdog:
    """`beat()` says that this rank is alive; too long without one ends the process.

    Args:
        timeout: seconds.
        where: which rank this is, and how far it has come.
    """

    def __init__(self, timeout: float, where: Callable[[], str]) -> None:
        self.timeout, self.where = timeout, where
        self.idle = 0.0  # seconds since the last beat

    def beat(self) -> None:
        self.idle = 0.0

    def watch(self, ended: threading.Event) -> None:
        pause, last = min(1.0, self.timeout / 10), time.monotonic()
        while not ended.wait(pause):
            # A job that was suspended and goes on has lost that time on the clock, but has not stalled in it.
            passed, last = time.monotonic() - last, time.monotonic()
            self.idle += min(passed, 2 * pause)
            if self.idle > self.timeout:
                self._end()

    def _end(self) -> None:
        log.error(event="stalled", seconds=self.idle)
        with suppress(*LOST, RuntimeError):  # there may be no standard error
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        error = StalledError(
            f"{self.where()} made no progress for {self.timeout:g} s",
            "see the stacks in the log, those of all ranks; raise --stall-timeout if it was busy",
        )
        leave(error)


@contextmanager
def watched(timeout: float, where: Callable[[], str]) -> Iterator[Watchdog]:
    """Inside, the process ends with 124 after `timeout` seconds without a beat; 0 watches nothing."""
    watchdog, ended = Watchdog(timeout, where), threading.Event()
    thread = threading.Thread(target=watchdog.watch, args=(ended,), daemon=True, name="watchdog")
    if timeout > 0:
        thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()  # a thread that Python finds running while it winds up can abort the process
