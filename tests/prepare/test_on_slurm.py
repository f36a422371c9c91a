"""slurm/prepare.sbatch on a real Slurm: two nodes with Ray write the same bytes as one with Polars."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fusion.errors import ExitCode
from tests.prepare.test_prepare import IDS, VECTORS, files, parquet
from tests.services import require
from tests.slurm_cluster import SlurmCluster, install

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    require(importlib.util.find_spec("ray") is not None, "ray")
    require(install(), "Slurm (root, and Debian's slurm-wlm, slurmdbd, munge and mariadb-server)")
    running = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    yield running
    running.stop()


def submitted(cluster: SlurmCluster, folder: Path, nodes: int, source: str) -> tuple[int, str]:
    """Submits the script and waits for its end. Returns the exit code of the job, and its output."""
    log = folder / f"{nodes}.log"
    command = ["sbatch", "--wait", f"--nodes={nodes}", "--cpus-per-task=1", "--mem=500", "--time=5"]
    command += [f"--chdir={folder}", f"--output={log}", str(ROOT / "slurm/prepare.sbatch")]
    command += ["--table", str(folder / "t.csv"), "--to", str(folder / str(nodes)), "--source", source]
    environment = cluster.environment | {"FUSION_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, log.read_text() if log.exists() else done.stderr


def test_on_one_node_and_on_two(cluster: SlurmCluster, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "t.csv", IDS, "%d", header="sample_id", comments="")
    for i in range(2):
        parquet(tmp_path / f"raw/{i}.parquet", IDS[i::2], VECTORS[i::2])
    for nodes in (1, 2):
        code, said = submitted(cluster, tmp_path, nodes, f"a={tmp_path}/raw/*.parquet")
        assert code == ExitCode.DONE and "100 vectors of 6 float32" in said, said
    assert files(tmp_path / "1") == files(tmp_path / "2")
