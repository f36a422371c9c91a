"""Which run is the best of its kind, and which run is served: a better one of the same kind, or a promoted one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fusion.all_embeddings.config import Config
from fusion.config import ReadRunConfig
from fusion.errors import DataError
from fusion.records import pointers
from fusion.records.best_run import point_to_run, served
from fusion.records.find_run import open_run
from fusion.records.manifests import Checkpoint
from fusion.records.schemas import CheckpointManifest, RunPointer

VARIANT = Config.variant


def finish(output: Path, run_id: str, smape: float, split: str = "real", promote: bool = False) -> None:
    """A run that has finished, as far as pointers go."""
    folder = output / "runs" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "split.parquet").write_text(split)
    digest = "0" * 64
    manifest = CheckpointManifest(1, [], 1, 1, smape, True, digest, digest, "unknown")
    point_to_run(Config(output=str(output), run_id=run_id, promote=promote), Checkpoint("step-1", manifest))


def current(output: Path) -> str:
    pointer = served(str(output), VARIANT)
    assert pointer is not None
    return str(pointer.run_id)


def test_the_first_run_is_served_until_a_better_one_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_id, smape, expected in [("a", 50.0, "a"), ("b", 45.0, "b"), ("c", 47.0, "b"), ("d", 45.0, "b")]:
        finish(tmp_path, run_id, smape)
        assert current(tmp_path) == expected
    assert "event=not_served" not in capsys.readouterr().err


def test_a_run_on_other_data_does_not_replace_the_served_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(tmp_path, "real", 41.0)
    finish(tmp_path, "toy", 0.003, "one price")
    said = capsys.readouterr().err
    assert current(tmp_path) == "real" and "event=not_served" in said and "with --promote" in said
    finish(tmp_path, "better", 40.0)
    assert current(tmp_path) == "better", "the best of its kind is still served"


def test_each_kind_has_a_best_of_its_own(tmp_path: Path) -> None:
    finish(tmp_path, "real", 41.0)
    for run_id, smape in [("toy1", 3.0), ("toy2", 2.0), ("toy3", 2.5)]:
        finish(tmp_path, run_id, smape, "one price")
    folder = tmp_path / "pointers/runs" / VARIANT
    (other,) = [path.stem for path in folder.glob("best-*.json") if "real" not in path.read_text()]
    pointer = pointers.read(RunPointer, str(tmp_path), "runs", VARIANT, other)
    assert pointer is not None and pointer.run_id == "toy2"


def test_promote_serves_a_run_on_other_data(tmp_path: Path) -> None:
    finish(tmp_path, "old", 41.0)
    finish(tmp_path, "new", 44.0, "new data")
    assert current(tmp_path) == "old"
    finish(tmp_path, "new", 44.0, "new data", promote=True)
    assert current(tmp_path) == "new", "the same command was run again on the finished run"
    finish(tmp_path, "older", 30.0)
    assert current(tmp_path) == "new"
    finish(tmp_path, "newer", 43.0, "new data")
    assert current(tmp_path) == "newer"


def test_a_worse_run_can_be_promoted(tmp_path: Path) -> None:
    finish(tmp_path, "a", 41.0)
    finish(tmp_path, "b", 42.0, promote=True)
    assert current(tmp_path) == "b"


def test_the_kind_of_a_pointer_of_an_earlier_version_is_read_from_its_run(tmp_path: Path) -> None:
    finish(tmp_path, "real", 41.0)
    pointers.move(str(tmp_path), "runs", VARIANT, "best", target=RunPointer("real", "step-1", 41.0))
    finish(tmp_path, "toy", 0.003, "one price")
    assert current(tmp_path) == "real"
    finish(tmp_path, "better", 40.0)
    assert current(tmp_path) == "better"


def test_a_run_that_was_deleted_is_not_served(tmp_path: Path) -> None:
    finish(tmp_path, "a", 41.0)
    shutil.rmtree(tmp_path / "runs/a")
    assert served(str(tmp_path), VARIANT) is None
    with pytest.raises(DataError, match="no finished run"):
        open_run(ReadRunConfig(output=str(tmp_path)), Config)
    finish(tmp_path, "toy", 60.0, "other rows")
    assert current(tmp_path) == "toy"
