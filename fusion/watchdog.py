"""Ends a rank that makes no progress: dumps the stacks of all threads, then leaves with 124."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fusion import log
from fusion.errors import ExitCode


class Watchdog:
    """`beat()` says that this rank is alive; too long without one ends the process."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.last = timeout, time.monotonic()

    def beat(self) -> None:
        self.last = time.monotonic()

    def watch(self, ended: threading.Event) -> None:
        while not ended.wait(min(1.0, self.timeout / 10)):
            silent = time.monotonic() - self.last
            if silent > self.timeout:
                log.error(event="stalled", seconds=silent, to_do="see the stacks; raise --stall-timeout if it was busy")
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(ExitCode.STALLED)  # nothing else gets out of a collective that waits for a dead rank


@contextmanager
def watched(timeout: float) -> Iterator[Watchdog]:
    """Inside, the process ends with 124 after `timeout` seconds without a beat; 0 watches nothing."""
    watchdog, ended = Watchdog(timeout), threading.Event()
    thread = threading.Thread(target=watchdog.watch, args=(ended,), daemon=True, name="watchdog")
    if timeout > 0:
        thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
