"""`fusion.score` and `Model.evaluate` give the figures of `evaluate_by_groups`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pytest
import torch

import fusion
from fusion.errors import DataError
from fusion.qwen_clip import evaluate_by_groups
from tests.api.test_training import config_of

TRUE, PREDICTED = [10.0, 20.0, 40.0, 8.0], [11.0, 18.0, 40.0, 2.0]


@pytest.fixture(scope="module")
def model(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> fusion.Model:
    return fusion.train(config_of(tmp_path_factory.mktemp("run"), data=str(catalog)), quiet=True)


def test_an_evaluation_is_that_of_the_command(model: fusion.Model, catalog: Path) -> None:
    sources = {role: pd.read_parquet(catalog / f"embeddings/test/{role}.parquet") for role in model.sources}
    before = model.predict(pd.read_csv(catalog / "test.csv"), sources)
    found = model.evaluate(by="category")
    assert not (Path(model.url) / "metrics/groups.parquet").exists(), "it only reads"
    assert evaluate_by_groups.main(["--output", model.config.output, "--by", "category", "--device", "cpu"]) == 0
    pd.testing.assert_frame_equal(found, pd.read_parquet(Path(model.url) / "metrics/groups.parquet"), check_exact=True)
    assert found["smape"].iloc[0] == pytest.approx(model.metrics["smape"])
    pd.testing.assert_frame_equal(model.predict(pd.read_csv(catalog / "test.csv"), sources), before)


def test_an_evaluation_needs_its_data(model: fusion.Model, catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no column 'categry'.*\nhint: did you mean category"):
        model.evaluate(by=["categry"])
    with pytest.raises(DataError, match=r"neither .*train.csv nor train.parquet exists"):
        model.evaluate(data=str(tmp_path))
    pd.testing.assert_frame_equal(model.evaluate(data=str(catalog)), model.evaluate())


def test_validation_rows_are_scored_as_in_the_evaluation(model: fusion.Model, catalog: Path) -> None:
    frame = pd.read_csv(catalog / "train.csv", dtype={"sample_id": str})
    rows = model.validation
    truth = frame[frame["sample_id"].isin(rows["sample_id"])].drop(columns="price").merge(rows[["sample_id", "price"]])
    predicted = rows[["sample_id", "predicted"]].rename(columns={"predicted": "price"}).sample(frac=1, random_state=1)
    found = fusion.score(truth, predicted, by=["category", "price_bin"])
    expected = model.evaluate(by="category")
    expected = expected[expected["by"].isin(["overall", "price_bin", "category"])].reset_index(drop=True)
    intervals = ["smape_low", "smape_high"]  # the evaluation knows which rows are near-duplicates, and so dependent
    figures = found.columns.drop(intervals)
    pd.testing.assert_frame_equal(found[figures], expected[figures], check_exact=False, rtol=1e-6)
    widths = [one["smape_high"] - one["smape_low"] for one in (found, expected)]
    assert widths[0][0] == pytest.approx(widths[1][0], rel=0.2) and widths[0][0] != widths[1][0]


@pytest.mark.parametrize("form", [list, np.array, pd.Series, torch.tensor])
def test_prices_may_be_arrays(form: Any) -> None:
    found = fusion.score(form(TRUE), form(PREDICTED))
    expected = fusion.compute_metrics(TRUE, PREDICTED)
    assert {name: found[name].iloc[0] for name in expected} == expected
    assert list(found["group"]) == ["all rows"] and found["count"].iloc[0] == 4


def test_rows_are_joined_by_their_ids() -> None:
    truth = pd.DataFrame({"sample_id": [1, 2, 3, 4], "price": TRUE, "shop": ["a", "b", "a", None]})
    predicted = pd.DataFrame({"sample_id": [4, 3, 2, 1, 9], "price": [*PREDICTED[::-1], 5.0]})
    expected = fusion.score(TRUE, PREDICTED)
    for one in (predicted, predicted.set_index("sample_id"), polars.from_pandas(predicted)):
        found = fusion.score(truth, one, by="shop")
        assert list(found["group"]) == ["all rows", "a", "b", "missing"]
        pd.testing.assert_frame_equal(found.head(1), expected)
    pd.testing.assert_frame_equal(fusion.score(truth, PREDICTED).head(1), expected)


def test_bounds_are_scored() -> None:
    truth = pd.DataFrame({"sample_id": ["a", "b"], "price": [10.0, 20.0]})
    predicted = truth.assign(price=[9.0, 9.0], low_90=[8.0, 8.0], high_90=[12.0, 12.0])
    assert fusion.score(truth, predicted)["covered_90"].iloc[0] == 0.5


@pytest.mark.parametrize(
    ("truth", "predicted", "by", "message"),
    [
        (TRUE, PREDICTED[:3], (), r"predicted has shape \[3\], expected \[4\]"),
        ([*TRUE[:3], np.nan], PREDICTED, (), "1 of 4 rows of truth have no price above zero"),
        (TRUE, [*PREDICTED[:3], -1.0], (), "1 of 4 rows of predicted have no price above zero"),
        (
            pd.DataFrame({"sample_id": [7], "price": [1.0]}),
            pd.DataFrame({"sample_id": [8], "price": [1.0]}),
            (),
            "lacks 1",
        ),
        (pd.DataFrame({"sample_id": [7], "price": [1.0]}), [1.0], "price_bins", "did you mean price_bin?"),
        (pd.DataFrame({"id": [7], "price": [1.0]}), [1.0], (), "truth has no column 'sample_id'"),
        (np.ones((2, 2)), [1.0], (), r"truth has shape \[2, 2\]"),
    ],
)
def test_wrong_prices_are_named(truth: Any, predicted: Any, by: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fusion.score(truth, predicted, by)
