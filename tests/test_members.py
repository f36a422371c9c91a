"""Members of folds and seeds, trained side by side: each row is priced by those that never saw its price."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from fusion import manifests
from fusion.all_embeddings import evaluate_by_groups, train
from fusion.validation import validation_of
from tests.conftest import SMALL

RECIPES = {
    "single": [],
    "members": ["--folds", "3", "--seeds", "2"],
    "one fold": ["--folds", "3", "--fold", "1"],
    "published": ["--recipe", "published"],
    "published members": ["--recipe", "published", "--folds", "3", "--seeds", "2"],
    "components alone": ["--neighbours", "0", "--folds", "2"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_evaluation_gives_the_validation_of_the_training(recipe: str, catalog: Path, tmp_path: Path) -> None:
    """What was found before the training, and what evaluation searches, are the same neighbours."""
    flags = ["--data", str(catalog), "--output", str(tmp_path), "--run-id", "r", *SMALL, "--epochs", "2"]
    assert train.main([*flags, *RECIPES[recipe]]) == 0
    (*_, made) = manifests.committed(str(tmp_path / "runs/r"))
    assert evaluate_by_groups.main(["--output", str(tmp_path), "--run-id", "r", "--device", "cpu"]) == 0
    metrics = tmp_path / "runs/r/metrics"
    assert json.loads((metrics / "summary.json").read_text())["smape"] == pytest.approx(made.smape, rel=1e-6)
    found = pd.read_parquet(metrics / "predictions.parquet").set_index("sample_id")["predicted"]
    trained = validation_of(made).set_index("sample_id")["predicted"]
    pd.testing.assert_series_equal(found, trained.loc[found.index], rtol=1e-5)
    if "--folds" in RECIPES[recipe] and "--fold" not in RECIPES[recipe]:
        assert len(found) == len(pd.read_parquet(tmp_path / "runs/r/split.parquet"))
