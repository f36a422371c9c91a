"""How a rank reports the error that ends it, and how it leaves when only the end of its process helps."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from fusion import environment
from fusion.errors import FusionError

RECORD_SECONDS = 5.0  # the store may be what hangs; a commit record takes less than one

Record = Callable[[FusionError], None]

_records: list[Record] = []


@contextmanager
def recorded_by(record: Record | None) -> Iterator[None]:
    """Inside, `record` keeps how this attempt ended if `leave` ends it; None where another rank does."""
    added = [] if record is None else [record]
    _records.extend(added)
    try:
        yield
    finally:
        del _records[len(_records) - len(added) :]


def leave(error: FusionError) -> NoReturn:
    """Reports and records the error, and ends the process with its code, whatever its other threads wait for."""
    tell(error)
    record = _records[-1] if _records else _let_another_record
    recording = threading.Thread(target=record, args=(error,), daemon=True)
    recording.start()
    recording.join(RECORD_SECONDS)
    os._exit(error.code)  # nothing else gets out of a collective operation that waits for a dead rank


def _let_another_record(_: FusionError) -> None:
    time.sleep(RECORD_SECONDS)  # the launcher ends all ranks soon after the first has left


def tell(error: FusionError, trace: str = "") -> None:
    """To the launcher that started this rank, which says it once; without one, on standard error."""
    rank, folder = environment.rank(), environment.variable("FUSION_EXIT_DIR")
    if folder:
        told = {"code": error.code, "error": error.message, "hint": error.remedy, "time": time.time()}
        with suppress(OSError):  # a full disk: then say it here
            Path(folder, f"{rank}.json").write_text(json.dumps(told | {"traceback": trace}))
            return
    if trace or folder or rank == 0:  # user errors hit every rank; only rank 0 prints
        print(f"{trace}{error.report()}", file=sys.stderr, flush=True)
