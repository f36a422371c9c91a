"""Ends a rank that makes no progress: dumps the stacks of all threads, records the error, and exits with 124."""

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
from fusion.terminal.streams import LOST


class Watchdog:
    """Ends the process if `beat()` is not called for too long.

    Args:
        timeout: seconds without a call after which the process ends.
        where: describes this rank and its progress, for the error message.
    """

    def __init__(self, timeout: float, where: Callable[[], str]) -> None:
        self.timeout, self.where = timeout, where
        self.idle = 0.0  # seconds since the last beat, without those in which the process was suspended

    def beat(self) -> None:
        self.idle = 0.0

    def watch(self, ended: threading.Event) -> None:
        """Checks until `ended` is set; runs in a thread of its own."""
        pause, last = min(1.0, self.timeout / 10), time.monotonic()
        while not ended.wait(pause):
            # If the job was suspended, the clock went on, but the rank did not stall. So a pass counts for two at most.
            passed, last = time.monotonic() - last, time.monotonic()
            self.idle += min(passed, 2 * pause)
            if self.idle > self.timeout:
                self._end()

    def _end(self) -> None:
        log.error(event="stalled", seconds=self.idle)
        with suppress(*LOST, RuntimeError):  # standard error may be closed
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        error = StalledError(
            f"{self.where()} made no progress for {self.timeout:g} s",
            "see the stacks of all ranks in the log; raise --stall-timeout if the rank was only busy",
        )
        leave(error)


@contextmanager
def watched(timeout: float, where: Callable[[], str]) -> Iterator[Watchdog]:
    """Inside the block, the process exits with 124 after `timeout` seconds without a beat; 0: it never does."""
    watchdog, ended = Watchdog(timeout, where), threading.Event()
    thread = threading.Thread(target=watchdog.watch, args=(ended,), daemon=True, name="watchdog")
    if timeout > 0:
        thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()  # a thread that still runs when the interpreter shuts down can abort the process
