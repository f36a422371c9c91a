"""How a rank reports the error that ends it, and how it exits while other threads of it hang."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from fusion import environment
from fusion.errors import FusionError
from fusion.terminal.error_display import print_report

# Longest time to wait for `exit.json` to be written to the store. The write usually takes less than a second, but the
# store may be the very thing that hangs; then the process exits without the record.
RECORD_SECONDS = 5.0

Record = Callable[[FusionError], None]  # writes to the run's folder how the attempt ended

_records: list[Record] = []


@contextmanager
def recorded_by(record: Record | None) -> Iterator[None]:
    """Inside the block, `leave` calls `record` before it exits; None on ranks that do not record."""
    added = [] if record is None else [record]
    _records.extend(added)
    try:
        yield
    finally:
        del _records[len(_records) - len(added) :]


def leave(error: FusionError) -> NoReturn:
    """Reports and records the error, and exits with its code even if other threads of the process hang."""
    report(error)
    record = _records[-1] if _records else _wait_for_another_rank_to_record
    recording = threading.Thread(target=record, args=(error,), daemon=True)
    recording.start()
    recording.join(RECORD_SECONDS)
    # The main thread may be inside a collective operation that waits for a dead rank. Nothing else interrupts that.
    os._exit(error.code)


def _wait_for_another_rank_to_record(_: FusionError) -> None:
    # The launcher kills all ranks soon after the first one exits. Waiting gives rank 0 time to write the record.
    time.sleep(RECORD_SECONDS)


def report(error: FusionError, trace: str = "") -> None:
    """Hands the error to the launcher, which prints it once for all ranks; without a launcher, prints it here."""
    rank, folder = environment.rank(), environment.variable("FUSION_EXIT_DIR")
    if folder:
        ending = {"code": error.code, "error": error.message, "hint": error.remedy, "time": time.time()}
        with suppress(OSError):  # such as a full disk: then the error is printed below
            Path(folder, f"{rank}.json").write_text(json.dumps(ending | {"traceback": trace}))
            return
    if trace or folder or rank == 0:  # user errors hit every rank; only rank 0 prints
        print_report(f"{trace}{error.report()}")
