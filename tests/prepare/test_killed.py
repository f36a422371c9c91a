"""Killed at any moment and run again, `fusion.prepare` leaves the same bytes; in between, training reads no mixture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fusion.prepare.__main__ import main
from tests.prepare import killed
from tests.prepare.test_prepare import IDS, VECTORS, parquet


def test_killed_at_every_write_and_run_again(tmp_path: Path) -> None:
    """The earlier folder has more shards, of other vectors, so that a mixture of both would be noticed."""
    earlier = parquet(tmp_path / "earlier.parquet", IDS, VECTORS + 1)
    first, second = (parquet(tmp_path / f"{i}.parquet", IDS[i::2], VECTORS[i::2]) for i in range(2))
    for name, ids in (("old.csv", IDS[:98]), ("new.csv", IDS)):
        np.savetxt(tmp_path / name, ids, "%d", header="sample_id", comments="")
    source = ["--source", f"a={earlier}", "--shard-rows", "25"]
    assert main(["--table", str(tmp_path / "old.csv"), "--to", str(tmp_path / "earlier"), *source]) == 0
    flags = ["--table", str(tmp_path / "new.csv"), "--source", f"a={first}", "--source", f"a={second}"]
    flags += ["--shard-rows", "40"]
    assert main([*flags, "--to", str(tmp_path / "undisturbed")]) == 0
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "tests.prepare.killed", str(tmp_path), *flags, "--to", str(tmp_path / "data")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"TMPDIR": str(scratch)}, timeout=120
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 20 and {one["code"] for one in told} == {-9}
    assert {one["again"] for one in told} == {0}
    assert {one["sha256"] for one in told} == {expected(tmp_path)}
    assert [one["at"] for one in told if not one["readable"]] == [
        "preparation-begins:after", *(one["at"] for one in told if one["at"].startswith(("prepared-shard", "surplus"))),
        "source-manifest:before", "source-manifest:inside", "source-manifest:after", "preparation-ends:before",
    ]  # fmt: skip
    assert not list(scratch.iterdir()), "each run removes what a killed one has left"


def expected(folder: Path) -> str:
    """The digest of an undisturbed run, at the path of the killed ones."""
    data = folder / "data"
    (folder / "undisturbed").rename(folder / "moved")
    data.rename(folder / "killed")
    (folder / "moved").rename(data)
    return killed.digest(data)
