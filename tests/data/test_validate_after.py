"""A run that validates on later rows than it trains on, as users run it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from fusion.qwen_clip import evaluate_by_groups, predict_test, train
from fusion.verify.__main__ import verify
from tests.conftest import SMALL

PUBLISHED = [*SMALL, "--recipe", "published"]


@pytest.fixture(scope="module")
def dated(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalog with a day of each product, which is missing nowhere; near-duplicates are of different days."""
    folder = tmp_path_factory.mktemp("dated") / "data"
    shutil.copytree(catalog, folder)
    table = pd.read_csv(folder / "train.csv", dtype="str")
    days = pd.date_range("2026-01-01", periods=len(table), freq="h")
    table["created"] = days.strftime("%Y-%m-%dT%H:%M:%S").to_series().sample(frac=1, random_state=0).to_numpy()
    table.to_csv(folder / "train.csv", index=False)
    return folder


def test_training_evaluation_and_prediction(dated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--output", str(tmp_path), "--run-id", "r"]
    assert (
        train.main(
            ["--data", str(dated), *where, *PUBLISHED, "--epochs", "2", "--validate-after", "created", "2026-01-20"]
        )
        == 0
    )
    assert "dropped=" in capsys.readouterr().err
    split = pd.read_parquet(tmp_path / "runs/r/split.parquet").set_index("sample_id")
    created = pd.read_csv(dated / "train.csv", dtype="str").set_index("sample_id")["created"].loc[split.index]
    assert ((split["side"] == "validation") == (created >= "2026-01-20")).all()
    assert not set(split.query("side == 'train'")["group"]) & set(split.query("side == 'validation'")["group"])
    assert (split["side"] == "dropped").any()
    assert evaluate_by_groups.main(where) == 0
    rows = pd.read_parquet(tmp_path / "runs/r/metrics/predictions.parquet")
    assert set(rows["sample_id"]) == set(split.index[split["side"] == "validation"])
    assert predict_test.main(where) == 0
    found = verify(str(tmp_path))
    assert [str(one) for one in found if one.verdict == "BAD"] == []
    assert any("are dropped" in one.what for one in found)


def test_a_row_without_a_date(dated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(dated, data)
    table = pd.read_csv(data / "train.csv", dtype="str")
    table.loc[3, "created"] = ""
    table.to_csv(data / "train.csv", index=False)
    flags = ["--data", str(data), "--output", str(tmp_path), *PUBLISHED, "--epochs", "1"]
    assert train.main([*flags, "--validate-after", "created", "2026-01-20"]) == 65
    said = capsys.readouterr().err
    assert f"1 of {len(table)} rows have no date in 'created', the first: {table['sample_id'][3]}" in said
    assert "hint: add the missing dates, or name another column with --validate-after" in said
