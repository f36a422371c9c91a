from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest

from fusion import report
from fusion.evaluation import BIN_NAMES, RANGE_NAMES, Evaluation, _summary, evaluate, price_bins
from fusion.manifests import Checkpoint
from fusion.metrics import compute_metrics, row_smape


def rows(prices: list[float] | np.ndarray, **columns: object) -> pd.DataFrame:
    prices = np.asarray(prices, float)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"sample_id": [f"id{i}" for i in range(len(prices))], "price": prices, "present": "all"})
    return frame.assign(predicted=np.abs(prices) * np.exp(0.3 * rng.standard_normal(len(prices))), **columns)


def show(evaluation: Evaluation) -> None:
    report.show(evaluation.groups, evaluation.worst, evaluation.best, evaluation.gates, evaluation.distributions)


def test_every_group_has_the_metrics_of_its_rows() -> None:
    prices = np.random.default_rng(1).lognormal(3, 1.5, 500)
    brands = np.where(np.arange(500) % 3, "a", "b")
    table = rows(prices, brand=brands)
    groups = evaluate(table, ["brand"]).groups.set_index(["by", "group"])
    assert list(groups.loc["price_bin"].index) == BIN_NAMES
    assert list(groups.loc["price_range"].index) == RANGE_NAMES
    for name in ("price_bin", "price_range", "present", "brand"):
        assert groups.loc[name, "count"].sum() == 500
        assert groups.loc[name, "share"].sum() == pytest.approx(1)
    for (by, group), part in {("brand", "a"): table[brands == "a"], ("overall", "all rows"): table}.items():
        found, wanted = groups.loc[(by, group)], compute_metrics(part["price"], part["predicted"])
        for metric, value in wanted.items():
            assert found[metric] == pytest.approx(value)
        assert found["smape_low"] < found["smape"] < found["smape_high"]
        assert found["bias"] == pytest.approx((part["predicted"] - part["price"]).mean())
        assert found["median_error"] == pytest.approx((part["predicted"] - part["price"]).abs().median())


def test_bins_hold_their_lower_edge() -> None:
    prices = pd.Series([0.01, 4.99, 5, 10, 499.99, 500, 1e9, -1, np.nan])
    expected = ["0-5", "0-5", "5-10", "10-15", "200-500", "500+", "500+", "outside", "outside"]
    assert price_bins(prices).tolist() == expected


@pytest.mark.parametrize("prices", [[7.0], [7.0, 7.0], [-3.0, 7.0], [1e9], [0.001, 0.002]])
def test_a_single_row_empty_bins_and_prices_outside_break_nothing(
    prices: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = evaluate(rows(prices), [], gate=np.full((len(prices), 3), 1 / 3))
        show(evaluation)
    groups = evaluation.groups.set_index(["by", "group"])
    assert groups.loc["price_bin", "count"].sum() == len(prices)
    assert ("price_bin", "outside") in groups.index or min(prices) >= 0
    assert "all rows" in capsys.readouterr().out
    summary = json.loads(_summary("out/runs/r", Checkpoint("out/runs/r/checkpoints/step-1", {}), evaluation))
    assert summary["count"] == len(prices)


def test_worst_and_best_rows_are_twenty_and_in_order() -> None:
    table = rows(np.random.default_rng(2).lognormal(3, 1, 100))
    evaluation = evaluate(table, [])
    errors = np.sort(row_smape(table["price"], table["predicted"]))
    np.testing.assert_allclose(evaluation.worst["smape"], errors[::-1][:20])
    np.testing.assert_allclose(evaluation.best["smape"], errors[:20])


def test_gates_are_means_over_the_rows_of_a_bin() -> None:
    gate = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    gates = evaluate(rows([3.0, 4.0, 700.0]), [], gate=gate).gates
    assert gates.loc["0-5"].tolist() == [0.75, 0.25]
    assert gates.loc["500+"].tolist() == [0.0, 1.0]
    assert gates.loc["all rows"].tolist() == [0.5, 0.5]


def test_a_column_of_many_values_is_cut_off_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(np.full(600, 9.0), code=[str(i) for i in range(600)])
    assert (evaluate(table, ["code"]).groups["by"] == "code").sum() == 200
    assert "event=by_truncated column=code values=600" in capsys.readouterr().err
