"""On a Ray cluster of several processes, `fusion.prepare` writes the same bytes as on one machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion import storage
from fusion.errors import ConfigError, DataError, SupersededError
from fusion.prepare.__main__ import main
from fusion.prepare.folder import SourceFolder
from fusion.records.schemas import FileEntry
from tests.prepare.test_prepare import IDS, VECTORS, files, folder, loaded, parquet, run
from tests.prepare.test_prepare import table as table
from tests.services import require

HANG_SECONDS = 300  # a command that still runs then hangs: alone it takes 20 s, beside other tests 100 s
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
        [sys.executable, "-c", COMMANDS, str(tmp_path), str(other), *flags], capture_output=True, text=True, check=True,
        env=os.environ | {"RAY_ADDRESS": "local"}, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 65"], done.stderr
    assert "error: " in done.stderr and "of 6 x float64" in done.stderr and "hint: write all files" in done.stderr
    command = [sys.executable, "-m", "fusion.prepare", *flags, "--to", str(tmp_path / "polars")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert files(tmp_path / "ray") == files(tmp_path / "polars")


@pytest.fixture
def address() -> Iterator[str]:
    """Of a cluster of two nodes, which know nothing of the store and run in another folder."""
    require(importlib.util.find_spec("ray") is not None, "ray")
    command = [sys.executable, "-m", "tests.prepare.ray_cluster"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        yield next(line for line in process.stdout if line.startswith("address ")).split()[1]
        process.stdin.close()


def test_two_nodes_read_a_bucket_and_write_to_it(
    address: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes get endpoint and credentials from the command, and absolute paths for its relative ones."""
    monkeypatch.chdir(tmp_path)
    storage.write(f"{bucket}/products.csv", pd.DataFrame({"sample_id": IDS}).to_csv(index=False).encode())
    for i in range(3):
        file = parquet(tmp_path / f"{i}.parquet", IDS[i:60:3], VECTORS[i:60:3])
        storage.write(f"{bucket}/raw/{i}.parquet", file.read_bytes())
    np.save("v.npy", VECTORS[60:])
    np.save("i.npy", IDS[60:])
    flags = ["--table", f"{bucket}/products.csv", "--shard-rows", "30", "--source", f"a={bucket}/raw/*.parquet"]
    flags += ["--source", "a=v.npy,i.npy"]
    command = [sys.executable, "-m", "fusion.prepare", *flags, "--to", f"{bucket}/ray", "--engine", "ray"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"RAY_ADDRESS": address},
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert main([*flags, "--to", f"{bucket}/polars"]) == 0
    one, other = (
        {name: storage.read(entry.url) for name, entry in storage.find(f"{bucket}/{to}").items()}
        for to in ("ray", "polars")
    )
    assert one == other and len(one) == 6


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://10.0.0.1:10001", "error: ray://10.0.0.1:10001 is not an address of a Ray cluster that fusion.prepare"),
        ("127.0.0.1:1", "error: no Ray cluster answers at 127.0.0.1:1: "),
        ("head", "error: cannot join the Ray cluster head: "),
    ],
)
def test_a_wrong_address_is_an_error_with_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, message: str
) -> None:
    require(importlib.util.find_spec("ray") is not None, "ray")
    assert main(["--source", "a=x.parquet", "--to", str(tmp_path), "--engine", "ray", "--ray-address", address]) in (
        69,
        78,
    )
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith(message)
    assert hint.startswith("hint: ") and ("--ray-address" in hint or "ray job submit" in hint)


def test_files_that_workers_wrote_elsewhere_are_missed(tmp_path: Path, bucket: str) -> None:
    entry = FileEntry("part-00000.parquet", 3, storage.sha256(b"abc"))
    local = SourceFolder.of(str(tmp_path), "train", "a")
    with pytest.raises(DataError, match="1 files that workers of the cluster have written are not in") as caught:
        local.check_staged(local.new_staging(), [entry])
    assert "--to" in caught.value.remedy
    shared = SourceFolder.of(bucket, "train", "a")
    with pytest.raises(SupersededError, match=r"another fusion\.prepare has written"):
        shared.check_staged(shared.new_staging(), [entry])
    staging = shared.new_staging()
    storage.write(storage.join(staging, entry.key), b"abc")
    shared.check_staged(staging, [entry])


def test_a_worker_without_this_package_or_a_shared_disk_is_named(tmp_path: Path) -> None:
    require(importlib.util.find_spec("ray") is not None, "ray")
    from fusion.prepare import on_ray
    from fusion.prepare.inputs import ParquetFile
    from fusion.storage import Entry

    wrapped = on_ray._own(ImportError("No module named 'fusion'"), RuntimeError)
    assert (
        isinstance(wrapped, ConfigError)
        and "cannot run this version of fusion: No module named 'fusion'" in wrapped.message
    )
    with pytest.raises(DataError, match=r"x\.parquet does not exist on .*, a node of the Ray cluster") as caught:
        on_ray._check_shared(ParquetFile(Entry(f"{tmp_path}/x.parquet")).files)
    assert "--source" in caught.value.remedy


def test_staged_shards_of_a_killed_run_are_removed(table: Path) -> None:
    left = folder(table) / "_staging/0/part-00000.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    assert run(table, f"a={parquet(table.parent / 'raw.parquet', IDS, VECTORS)}") == 0
    assert not (folder(table) / "_staging").exists()
    assert loaded(table.parent / "data").present["role"].all()
