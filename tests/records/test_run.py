"""RunFolder: where a run's files lie, and what it reads of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.errors import DataError
from fusion.qwen_clip.config import Config
from fusion.records.run import RunFolder, config_digest, differing
from fusion.records.schemas import RunFacts, seal, written

FACTS = RunFacts(
    run_id="r", variant="qwen_clip", config_sha256="0" * 64, data_sha256="1" * 64, dims={"clip_image": 3}, started="now"
)


def made(folder: Path, name: str, content: bytes) -> RunFolder:
    path = folder / "runs/r" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return RunFolder.named(str(folder), "r")


def test_the_layout() -> None:
    run = RunFolder.named("s3://bucket/output", "r")
    assert run == RunFolder.of(Config(output="s3://bucket/output", run_id="r"))
    assert str(run) == "s3://bucket/output/runs/r" and run.run_id == "r"
    assert (
        run.at("metrics", "groups.csv") == f"{run.metrics}/groups.csv" == "s3://bucket/output/runs/r/metrics/groups.csv"
    )
    assert str(run.checkpoint("step-00000003")) == f"{run}/checkpoints/step-00000003"
    assert str(run.attempt(2)) == f"{run}/attempts/2"


def test_a_run_exists_once_it_has_settings_or_is_an_ensemble(tmp_path: Path) -> None:
    assert not RunFolder.named(str(tmp_path), "r").exists()
    assert made(tmp_path, "config.json", b"{}").exists()
    assert made(tmp_path / "other", "ensemble.json", b"{}").exists()


def test_facts_that_are_missing_whole_or_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.named(str(tmp_path), "r")
    assert run.facts() is None and run.facts_if_whole() is None
    content = seal(written(FACTS))
    assert made(tmp_path, "run.json", content).facts() == FACTS
    made(tmp_path, "run.json", content.replace(b"qwen_clip", b"all_embeddings"))
    with pytest.raises(DataError, match=r"run\.json is damaged: it has changed since it was written"):
        run.facts()
    assert run.facts_if_whole() is None and "event=run_damaged" in capsys.readouterr().err


def test_documents_hold_only_keys_that_are_known() -> None:
    assert "world_size" not in written(FACTS) and written(FACTS)["revision"] == "unknown"


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"{", "Expecting property name"), (b"[1]", r"expected an object with settings, found \[1\]")],
)
def test_damaged_settings(tmp_path: Path, content: bytes, cause: str) -> None:
    run = made(tmp_path, "config.json", content)
    with pytest.raises(DataError, match=f"config.json is damaged: {cause}"):
        run.settings()


def test_settings_have_dotted_keys(tmp_path: Path) -> None:
    run = made(tmp_path, "config.json", json.dumps({"lr": 0.1, "sources": {"clip_image": "a"}}).encode())
    assert run.settings() == {"lr": 0.1, "sources.clip_image": "a"}


def test_a_run_without_checkpoints_has_no_best(tmp_path: Path) -> None:
    run = made(tmp_path, "config.json", b"{}")
    assert run.checkpoints() == run.validated() == [] and run.split_digest() == ""
    with pytest.raises(DataError, match="runs/r has no committed checkpoint"):
        run.best()


def test_an_ensemble_without_a_manifest_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this ensemble was not completed"):
        made(tmp_path, "ensemble.json", b"{}").ensemble()


def test_settings_that_differ() -> None:
    one, other = {"lr": 0.1, "seed": 0, "output": "a"}, {"lr": 0.2, "seed": 0, "output": "b", "width": 3}
    assert differing([one, other], {"output"}) == {"lr": [0.1, 0.2], "width": [None, 3]}


def test_where_data_lie_does_not_change_what_a_run_computes() -> None:
    assert config_digest({"lr": 0.1, "data": "a", "output": "b"}) == config_digest(
        {"lr": 0.1, "data": "c", "output": "d"}
    )
    assert config_digest({"lr": 0.1}) != config_digest({"lr": 0.2})
