"""Ends a rank that makes no progress: dumps the stacks of all threads, says and records it, then leaves with 124."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fusion import log
from fusion.ending import tell
from fusion.errors import StalledError
from fusion.streams import LOST

RECORD_SECONDS = 5.0  # the store may be what hangs

Record = Callable[[StalledError], None]


class Watchdog:
    """`beat()` says that this rank is alive; too long without one ends the process.

    Args:
        timeout: seconds.
        where: which rank this is, and how far it has come.
        record: keeps how this attempt ended; None where another rank does, which is then given the time to.
    """

    def __init__(self, timeout: float, where: Callable[[], str], record: Record | None) -> None:
        self.timeout, self.where, self.record = timeout, where, record
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
        tell(error)
        recording = threading.Thread(target=self.record or _let_another_record, args=(error,), daemon=True)
        recording.start()
        recording.join(RECORD_SECONDS)
        os._exit(error.code)  # nothing else gets out of a collective that waits for a dead rank


def _let_another_record(_: StalledError) -> None:
    time.sleep(RECORD_SECONDS)  # the launcher ends all ranks soon after the first has left


@contextmanager
def watched(timeout: float, where: Callable[[], str], record: Record | None = None) -> Iterator[Watchdog]:
    """Inside, the process ends with 124 after `timeout` seconds without a beat; 0 watches nothing."""
    watchdog, ended = Watchdog(timeout, where, record), threading.Event()
    thread = threading.Thread(target=watchdog.watch, args=(ended,), daemon=True, name="watchdog")
    if timeout > 0:
        thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()  # a thread that Python finds running while it winds up can abort the process
