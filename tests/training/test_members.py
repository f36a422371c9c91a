"""Models with several members (--folds, --seeds): each row is predicted by members that were not trained on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.demo.catalog import generate
from fusion.records.run import RunFolder
from fusion.records.validation import validation_of
from fusion.submissions.predictions import from_parquet
from fusion.training.steps import SIMILARITY_LR, Steps
from tests.conftest import DIMS, SMALL

RECIPES = {
    "single": [],
    "members": ["--folds", "3", "--seeds", "2"],
    "one fold": ["--folds", "3", "--fold", "1"],
    "published": ["--recipe", "published"],
    "published members": ["--recipe", "published", "--folds", "3", "--seeds", "2"],
    "components alone": ["--neighbours", "0", "--folds", "2"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_equals_the_validation_of_the_training(recipe: str, catalog: Path, tmp_path: Path) -> None:
    """Evaluation searches the same neighbours that the training found before its first step."""
    flags = ["--data", str(catalog), "--output", str(tmp_path), "--run-id", "r", *SMALL, "--epochs", "2"]
    assert train.main([*flags, *RECIPES[recipe]]) == 0
    (*_, made) = RunFolder(str(tmp_path / "runs/r")).checkpoints()
    assert evaluate_by_groups.main(["--output", str(tmp_path), "--run-id", "r", "--device", "cpu"]) == 0
    metrics = tmp_path / "runs/r/metrics"
    assert json.loads((metrics / "summary.json").read_text())["smape"] == pytest.approx(made.smape, rel=1e-6)
    found = pd.read_parquet(metrics / "predictions.parquet").set_index("sample_id")["predicted"]
    trained = validation_of(made).set_index("sample_id")["predicted"]
    pd.testing.assert_series_equal(found, trained.loc[found.index], rtol=1e-5)
    if "--folds" in RECIPES[recipe] and "--fold" not in RECIPES[recipe]:
        assert len(found) == len(pd.read_parquet(tmp_path / "runs/r/split.parquet"))


def predictions_of(data: Path, output: Path, *more: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trains a run, and returns its predictions for the validation rows and for test.csv."""
    where = ["--output", str(output), "--run-id", "r"]
    assert train.main(["--data", str(data), *where, *SMALL, "--epochs", "2", *more]) == 0
    for command in (evaluate_by_groups, predict_test):
        assert command.main([*where, "--device", "cpu"]) == 0
    (found,) = output.glob("submissions/**/predictions.parquet")
    return pd.read_parquet(output / "runs/r/metrics/predictions.parquet"), from_parquet(found.read_bytes())


def comparables(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, prices and weights of the comparable products of each row, each [N, n]."""
    names = ("comparable_ids", "comparable_prices", "comparable_weights")
    ids, prices, weights = (np.stack(rows[name].to_list()) for name in names)
    return ids, prices, weights


@pytest.fixture(scope="module")
def predicted_rows(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, pd.DataFrame]:
    return predictions_of(catalog, tmp_path_factory.mktemp("predicted_rows"), "--folds", "3")


def test_comparables_are_labelled_products_with_their_prices(
    predicted_rows: tuple[pd.DataFrame, pd.DataFrame], catalog: Path
) -> None:
    known = pd.read_csv(catalog / "train.csv", dtype={"sample_id": str}).set_index("sample_id")["price"]
    for rows in predicted_rows:
        ids, prices, weights = comparables(rows)
        assert set(ids.ravel()) <= set(known.index)
        np.testing.assert_array_equal(prices, known.loc[ids.ravel()].to_numpy().reshape(ids.shape))
        assert all(len(set(row)) == len(row) for row in ids)
        assert (np.diff(weights, axis=1) <= 0).all() and (weights >= 0).all()
        assert (weights.sum(1) <= 1 + 1e-6).all()


def test_a_row_without_any_embedding_has_no_comparables(predicted_rows: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    evaluated, predicted = predicted_rows
    has_comparables = [comparables(rows)[2].any(axis=1) for rows in predicted_rows]
    assert (has_comparables[0] == (evaluated["present"] != "none")).all() and not has_comparables[0].all()
    assert len(predicted) - has_comparables[1].sum() == 1, "one row of test.csv is in no source"


def test_a_validation_row_is_never_its_own_comparable(
    predicted_rows: tuple[pd.DataFrame, pd.DataFrame], catalog: Path
) -> None:
    texts = pd.read_csv(catalog / "train.csv", dtype={"sample_id": str}).set_index("sample_id")["catalog_content"]
    rows = predicted_rows[0]
    ids, _, _ = comparables(rows)
    assert not (ids == rows["sample_id"].to_numpy()[:, None]).any()
    own = texts.loc[rows["sample_id"]].to_numpy()[:, None]
    assert not (texts.loc[ids.ravel()].to_numpy().reshape(ids.shape) == own).any(), "its near-duplicates are not either"


def test_neighbours_may_be_more_than_rows(tmp_path: Path) -> None:
    generate(tmp_path / "data", n_products=48, dims=DIMS)
    more = ["--max-missing", "0.5", "--neighbours", "1000", "--folds", "2"]
    evaluated, predicted = predictions_of(tmp_path / "data", tmp_path / "output", *more)
    for prices in (evaluated["predicted"], predicted["price"]):
        assert np.isfinite(prices).all() and (prices > 0).all()
    (*_, made) = RunFolder(str(tmp_path / "output/runs/r")).checkpoints()
    trained = validation_of(made).set_index("sample_id")["predicted"]
    found = evaluated.set_index("sample_id")["predicted"]
    pd.testing.assert_series_equal(found, trained.loc[found.index], rtol=1e-5)


def test_the_learning_rate_rises_and_falls_to_0(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, update = [], Steps._update

    def recorded(steps: Steps) -> None:
        update(steps)
        rates.append([group["lr"] for group in steps.optimizer.param_groups])

    monkeypatch.setattr(Steps, "_update", recorded)
    where = ["--data", str(catalog), "--output", str(tmp_path), "--run-id", "r"]
    assert train.main([*where, *SMALL, "--lr", "0.01", "--epochs", "4", "--warmup", "0.25"]) == 0
    of_networks, of_similarities = np.array(rates).T
    n_steps, n_rising = len(rates), len(rates) // 4
    assert n_steps % 4 == 0
    np.testing.assert_allclose(of_networks[:n_rising], 0.01 * np.arange(1, n_rising + 1) / n_rising)
    middle = n_rising + (n_steps - n_rising) // 3 - 1
    expected = 0.005 + 0.005 * np.cos(np.pi * (middle + 1 - n_rising) / (n_steps - n_rising))
    assert of_networks[middle] == pytest.approx(expected)
    assert (np.diff(of_networks[n_rising - 1 :]) < 0).all() and of_networks[-1] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(of_similarities, SIMILARITY_LR * of_networks)
