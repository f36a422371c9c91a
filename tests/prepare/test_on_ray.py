"""On a Ray cluster of several processes, `fusion.prepare` writes the same bytes as on one machine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from tests.prepare.test_prepare import IDS, VECTORS, files, parquet
from tests.services import require

# All commands use one cluster, because it takes seconds to start.
COMMANDS = """
import sys
from contextlib import nullcontext
from fusion.prepare import __main__ as command, on_ray
folder, other, *flags = sys.argv[1:]
with on_ray.cluster():
    command._engine = lambda _: nullcontext()
    flags += ["--to", f"{folder}/ray", "--engine", "ray"]
    print("code", command.main(flags))
    print("code", command.main([*flags, "--source", f"a={other}"]))
"""


def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    """Of three files, with repeated and unknown ids, and with a shard that has no rows; and an error of a worker."""
    require(importlib.util.find_spec("ray") is not None, "ray")
    pd.DataFrame({"sample_id": IDS}).to_csv(tmp_path / "t.csv", index=False)
    later = np.argsort(IDS.astype(str))[10:]
    ids, vectors = np.append(IDS[later], [5, IDS[later[0]]]), np.vstack([VECTORS[later], VECTORS[[0, later[0]]]])
    for i in range(2):
        parquet(tmp_path / f"{i}.parquet", ids[i:60:2], vectors[i:60:2])
    np.save(tmp_path / "v.npy", vectors[60:])
    np.save(tmp_path / "i.npy", ids[60:])
    flags = ["--table", f"{tmp_path}/t.csv", "--shard-rows", "9", "--max-missing", "0.2"]
    flags += ["--source", f"a={tmp_path}/?.parquet", "--source", f"a={tmp_path}/v.npy,{tmp_path}/i.npy"]
    other = parquet(tmp_path / "other/x.parquet", IDS, VECTORS.astype(np.float64))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tmp_path), str(other), *flags], capture_output=True, text=True, check=True
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 65"], done.stderr
    assert "error: " in done.stderr and "of 6 x float64" in done.stderr and "hint: write all files" in done.stderr
    command = [sys.executable, "-m", "fusion.prepare", *flags, "--to", str(tmp_path / "polars")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert files(tmp_path / "ray") == files(tmp_path / "polars")
