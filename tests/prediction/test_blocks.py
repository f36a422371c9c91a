"""A prediction that reads sources block by block gives the bytes and the errors of one that reads all rows at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion.all_embeddings import train
from fusion.records import pointers
from fusion.records.schemas import SubmissionPointer
from tests.conftest import SMALL, Done, run_command

ROOT = Path(__file__).parents[2]
FILES = ("submission.csv", "predictions.parquet", "fingerprints.parquet")
BLOCKS = {"FUSION_TEST_BLOCKS": "1"}


@pytest.fixture(scope="module")
def trained(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, of which the test sources are sorted by id, in groups of 16 rows, and a run on them."""
    folder = tmp_path_factory.mktemp("blocks")
    shutil.copytree(catalog, folder / "data")
    for source in (folder / "data/embeddings/test").glob("*.parquet"):
        rewrite(source, lambda table: table.sort_by("sample_id"))
    flags = ["--data", str(folder / "data"), "--output", str(folder / "output"), "--run-id", "r", *SMALL]
    assert train.main([*flags, "--epochs", "2", "--features", "text"]) == 0
    return folder


def rewrite(source: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(source)
    ids = pa.array(table["sample_id"].to_pandas().astype(str))
    table = change(table.set_column(table.schema.get_field_index("sample_id"), "sample_id", ids))
    pq.write_table(table, source, row_group_size=16)


@pytest.fixture
def data(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "data", tmp_path / "data")
    return tmp_path / "data"


def predict(trained: Path, output: Path, *flags: str, ranks: int = 1, **variables: str) -> Done:
    launcher = ["fusion.launch", "--nproc-per-node", str(ranks), "tests.small_parts", "predict_test"]
    where = ["--run-dir", str(trained / "output/runs/r"), "--output", str(output), "--date", "2026-01-02"]
    env = {"PYTHONPATH": str(ROOT), **variables}
    return run_command(*launcher, *where, "--device", "cpu", *flags, env=env)


def published(output: Path) -> dict[str, bytes]:
    current = pointers.read(SubmissionPointer, str(output), "submissions", "test", "current")
    assert current is not None
    return {name: (output / "submissions" / current.submission / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def expected(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("at-once")
    done = predict(trained, output)
    assert done.code == 0 and "event=reads_blocks" not in done.err, done.err
    return published(output)


@pytest.mark.parametrize("ranks", [1, 3])
def test_blocks_give_the_same_bytes(ranks: int, trained: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    done = predict(trained, tmp_path, ranks=ranks, **BLOCKS)
    assert done.code == 0, done.err
    assert "event=reads_blocks" in done.err and "event=loaded role=clip_image" in done.err
    assert published(tmp_path) == expected
    assert published(tmp_path) == expected
    assert not list(tmp_path.rglob("parts/*/*"))


def test_a_prediction_in_blocks_resumes(trained: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    stopped = predict(trained, tmp_path, **BLOCKS, FUSION_TEST_SIGNAL="SIGTERM")
    assert stopped.code == 75, stopped.err
    again = predict(trained, tmp_path, ranks=2, **BLOCKS)
    assert again.code == 0 and "event=resumed parts=2/7" in again.err, again.err
    assert published(tmp_path) == expected
    assert published(tmp_path) == expected


def test_sources_in_another_order_are_read_at_once(
    trained: Path, data: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:

    for source in (data / "embeddings/test").glob("*.parquet"):
        rewrite(source, lambda table: table.take(sorted(range(len(table)), key=lambda row: row % 7)))
    done = predict(trained, tmp_path / "output", "--data", str(data), **BLOCKS)
    assert done.code == 0 and "event=reads_blocks" not in done.err, done.err
    assert published(tmp_path / "output") == expected


def repeated(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(40, 1)]).sort_by("sample_id")


def lacking(table: pa.Table) -> pa.Table:
    return table.slice(0, 60)


@pytest.mark.parametrize("change", [repeated, lacking])
def test_wrong_sources_are_refused_as_those_that_are_read_at_once(
    change: Callable[[pa.Table], pa.Table], trained: Path, data: Path, tmp_path: Path
) -> None:
    rewrite(data / "embeddings/test/siglip_text.parquet", change)
    outcomes = [predict(trained, tmp_path / f"{len(one)}", "--data", str(data), **one) for one in ({}, BLOCKS)]
    errors = [[line for line in one.err.splitlines() if line.startswith(("error:", "hint:"))] for one in outcomes]
    assert [one.code for one in outcomes] == [65, 65]
    assert errors[0] == errors[1] != []
    assert not list((tmp_path / "1").rglob("MANIFEST.json"))


def test_embeddings_of_another_kind_are_refused(trained: Path, data: Path, tmp_path: Path) -> None:
    source = data / "embeddings/test/clip_image.parquet"
    frame = pd.read_parquet(source)
    frame["embedding"] = [9 * vector for vector in frame["embedding"]]
    frame.to_parquet(source, row_group_size=16)
    done = predict(trained, tmp_path / "output", "--data", str(data), **BLOCKS)
    assert done.code == 65 and "embeddings of clip_image differ from those of the training" in done.err
    assert not list((tmp_path / "output").rglob("parts/*/*"))
