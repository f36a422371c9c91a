"""Two processes prepare one source at the same time: the result is whole, and a superseded one says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fusion import storage
from fusion.data.inputs import UNFINISHED
from fusion.verify.__main__ import verify
from tests.prepare.test_prepare import IDS, ORDER, VECTORS, N, parquet

# A prepare that waits for a file before each call of a function, and says in another file that it has come there.
WAITING = """
import sys, time
from pathlib import Path
from fusion.prepare import {module} as module
from fusion.prepare.__main__ import main
from tests.prepare.test_at_once import wait_for
original = module.{function}
def waiting(*arguments):
    Path({here!r}).touch()
    wait_for(lambda: Path({go!r}).exists())
    {after}
    return original(*arguments)
module.{function} = waiting
sys.exit(main(sys.argv[1:]))
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Prepare:
    """A process that prepares the source `a` of the folder `data`, and waits where it is told to."""

    def __init__(self, folder: Path, data: str, source: Path, at: str, after: str = "pass") -> None:
        self.here, self.go = folder / f"{source.stem}-{at}.here", folder / f"{source.stem}-{at}.go"
        module, function = at.split(".")
        script = WAITING.format(module=module, function=function, here=str(self.here), go=str(self.go), after=after)
        flags = ["--table", str(folder / "t.csv"), "--to", data, "--source", f"a={source}", "--shard-rows", "40"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()},
        )  # fmt: skip

    def wait(self) -> None:
        wait_for(self.here.exists)

    def ends(self) -> tuple[int, str, str]:
        self.go.touch()
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def data(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    in_bucket = getattr(request, "param", "folder") == "bucket"
    return f"{request.getfixturevalue('bucket')}/data" if in_bucket else str(tmp_path / "data")


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    np.savetxt(tmp_path / "t.csv", IDS, "%d", header="sample_id", comments="")
    return parquet(tmp_path / "old.parquet", IDS, VECTORS), parquet(tmp_path / "new.parquet", IDS, VECTORS + 1)


def check_whole(data: str, vectors: np.ndarray) -> None:
    assert {finding.verdict for finding in verify(data)} == {"ok"}
    found = [pq.read_table(storage.open_read(f"{data}/embeddings/train/a/part-0000{i}.parquet")) for i in range(3)]
    assert np.array_equal(np.vstack([np.stack(part["embedding"].to_numpy()) for part in found]), vectors[ORDER])


@pytest.mark.parametrize("data", ["folder", "bucket"], indirect=True)
def test_the_newer_one_takes_over_while_the_older_one_writes(
    tmp_path: Path, data: str, sources: tuple[Path, Path]
) -> None:
    """The older one waits with its first shard, and copies it after the newer one has copied all of its own."""
    old, new = sources
    older = Prepare(tmp_path, data, old, "folder._copy")
    older.wait()
    newer = Prepare(tmp_path, data, new, "folder.seal")
    newer.wait()
    code, _, err = older.ends()
    assert code == 78
    assert f"error: another fusion.prepare has written {data}/embeddings/train/a since this one began" in err
    assert "hint: let it finish; if it was given other files, run this command again afterwards" in err
    code, out, _ = newer.ends()
    assert code == 0 and f"{N} vectors" in out
    check_whole(data, VECTORS + 1)


def test_one_that_is_ready_later_replaces_the_result(tmp_path: Path, data: str, sources: tuple[Path, Path]) -> None:
    old, new = sources
    later = Prepare(tmp_path, data, old, "prepare.check")
    later.wait()
    assert Prepare(tmp_path, data, new, "folder.seal").ends()[0] == 0
    assert later.ends()[0] == 0
    check_whole(data, VECTORS)


def test_of_the_same_files_the_later_one_finds_the_result(
    tmp_path: Path, data: str, sources: tuple[Path, Path]
) -> None:
    same = sources[0]
    later = Prepare(tmp_path, data, same, "prepare.check")
    later.wait()
    other = Prepare(tmp_path, data, same, "prepare.first_kind")
    assert other.ends()[0] == 0
    code, out, _ = later.ends()
    assert code == 0 and "0 rows without one: written by another command" in out
    check_whole(data, VECTORS)


def test_a_marker_that_another_one_removes_late_is_written_again(
    tmp_path: Path, data: str, sources: tuple[Path, Path]
) -> None:
    marker = f"{data}/embeddings/train/a/{UNFINISHED}"
    remove = f"from fusion import storage; storage.remove({marker!r})"
    once = f"if not hasattr(module, 'once'): {remove}; module.once = True"
    one = Prepare(tmp_path, data, sources[0], "folder._copy", after=once)
    assert one.ends()[0] == 0
    check_whole(data, VECTORS)
