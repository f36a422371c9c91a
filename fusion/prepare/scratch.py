"""A temporary folder that is also removed after a kill: by the next command on this machine."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fusion.storage.scratch import temporary_folder

_PREFIX = "fusion-prepare-"
_LOCK = "lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Makes a folder below TMPDIR. A process holds a lock on its folder, so a folder without one is abandoned."""
    parent = temporary_folder()
    for abandoned in Path(parent).glob(f"{_PREFIX}*/{_LOCK}"):
        _remove_if_abandoned(abandoned)
    with TemporaryDirectory(prefix=_PREFIX, dir=parent) as folder, (Path(folder) / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


def _remove_if_abandoned(path: Path) -> None:
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
    except OSError:  # its process lives, it is another user's, or another process has just removed it
        return
