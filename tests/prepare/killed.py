"""Kills `fusion.prepare` at every boundary of its writes and of its work, and prints how the folder was left.

    python -m tests.prepare.killed FOLDER FLAG …

FOLDER has `earlier/`, a folder that was prepared before. For each boundary, the command with these flags runs on a copy
of it, `data/`, and is killed; then it runs again. Prints a line of JSON per boundary: its name, whether the process was
killed there, whether training would read the folder after the kill, the exit code of the second run, and a digest of
all files at the end. The processes are forked, so that libraries are loaded only once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion.data.inputs import find_sources
from fusion.errors import DataError
from fusion.prepare import inputs, work
from fusion.prepare.__main__ import main
from fusion.prepare.shards import Spilled
from tests.chaos.boundaries import PREPARATION, Boundary, arm, boundaries_of

WORK = ("spilling", "finishing")


def forked(action: Callable[[], int]) -> int:
    """Runs the action in a process of its own, and returns its exit code; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(n: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which after its n-th call kills the process."""
    calls = iter(range(1, n))

    def wrapped(*arguments: Any) -> Any:
        result = function(*arguments)
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def armed(kind: str, when: str, reached: Any) -> None:
    if kind == "spilling":
        Spilled.add = kill_after(int(when), Spilled.add)  # type: ignore[method-assign]
    elif kind == "finishing":
        work.finish_shard = kill_after(int(when), work.finish_shard)
    else:
        arm([Boundary(kind, when)], 0, reached)


def readable(data: Path) -> bool:
    try:
        return bool(find_sources(str(data), "train", {"role": "a"}))
    except DataError:
        return False


def digest(data: Path) -> str:
    """sha256 of all files below `data/embeddings`, and of the table."""
    files = [data / "train.csv", *sorted(path for path in (data / "embeddings").rglob("*") if path.is_file())]
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


def killed_at(folder: Path, flags: list[str], kind: str, when: str) -> dict[str, Any]:
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(folder / "earlier", data)

    def run() -> int:
        with (folder / "reached").open("wb", buffering=0) as reached:
            armed(kind, when, reached)
            return main(flags)

    code, kept = forked(run), readable(data)
    again = forked(lambda: main(flags))
    return {"at": f"{kind}:{when}", "code": code, "readable": kept, "again": again, "sha256": digest(data)}


if __name__ == "__main__":
    inputs.BATCH_BYTES = 1000  # so that there are several batches
    moments = [(kind, str(n)) for kind in WORK for n in (1, 2)]
    moments += [(boundary.kind, boundary.when) for boundary in boundaries_of(PREPARATION)]
    for kind, when in moments:
        print(json.dumps(killed_at(Path(sys.argv[1]), sys.argv[2:], kind, when)), flush=True)
