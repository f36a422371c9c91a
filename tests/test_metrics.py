"""Compares the metrics with independent implementations: SMAPE with torchmetrics, the others with scikit-learn."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from torchmetrics.functional import symmetric_mean_absolute_percentage_error

from fusion.metrics import bootstrap_interval, compute_metrics, compute_smape, group_metrics, readable, row_smape

N_ROWS = 500


def draw_prices(seed: int = 0, n_rows: int = N_ROWS) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    true = np.exp(generator.normal(3, 1, n_rows))
    return true, true * np.exp(generator.normal(0.1, 0.6, n_rows))


def independent_metrics(true: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    fraction = symmetric_mean_absolute_percentage_error(torch.tensor(pred).double(), torch.tensor(true).double())
    return {
        "smape": 100 * fraction.item(),
        "mae": sklearn.metrics.mean_absolute_error(true, pred),
        "rmse": sklearn.metrics.root_mean_squared_error(true, pred),
        "mape": 100 * sklearn.metrics.mean_absolute_percentage_error(true, pred),
        "r2": sklearn.metrics.r2_score(true, pred),
    }


def test_equals_values_computed_by_hand() -> None:
    true, pred = [100.0, 50.0, 0.0, 0.0], [50.0, 100.0, 0.0, 7.0]
    np.testing.assert_allclose(row_smape(true, pred), [200 / 3, 200 / 3, 0, 200])
    assert compute_smape(true, pred) == pytest.approx((200 / 3 + 200 / 3 + 200) / 4)
    metrics = compute_metrics([10, 20], [11, 18])
    assert metrics == pytest.approx({"smape": 10.025062656, "mae": 1.5, "rmse": math.sqrt(2.5), "mape": 10, "r2": 0.9})


@pytest.mark.parametrize("seed", range(3))
def test_equals_independent_implementations(seed: int) -> None:
    true, pred = draw_prices(seed)
    pred[:5] *= -1
    assert compute_metrics(true, pred) == pytest.approx(independent_metrics(true, pred), rel=1e-6)


def test_integers_equal_independent_implementations() -> None:
    generator = np.random.default_rng(4)
    true, pred = generator.integers(0, 100, N_ROWS), generator.integers(0, 100, N_ROWS)
    true[:2], pred[:2] = [0, 3], [0, 0]
    expected = independent_metrics(true, pred)
    for dtype in (np.int64, np.int32, np.uint8):
        assert compute_metrics(true.astype(dtype), pred.astype(dtype)) == pytest.approx(expected, rel=1e-6)
    assert compute_metrics(true.tolist(), pred.tolist()) == pytest.approx(expected, rel=1e-6)
    assert compute_metrics(torch.tensor(true), torch.tensor(pred)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_dtype_equal_their_float64_values(dtype: torch.dtype) -> None:
    true, pred = (torch.tensor(values).to(dtype) for values in draw_prices())
    expected = independent_metrics(true.double().numpy(), pred.double().numpy())
    assert compute_metrics(true, pred.requires_grad_()) == pytest.approx(expected, rel=1e-11)


def test_many_float32_rows_keep_float64_precision() -> None:
    true, pred = (values.astype(np.float32) for values in draw_prices(n_rows=2_000_000))
    expected = independent_metrics(true.astype(np.float64), pred.astype(np.float64))
    assert compute_metrics(true, pred) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("exponent", [-990, 990, 1010])  # up to about 1e-298 and 1e304
def test_metrics_scale_with_huge_and_tiny_values(exponent: int) -> None:
    true, pred = draw_prices()
    expected = independent_metrics(true, pred)
    for name in ("mae", "rmse"):
        expected[name] = math.ldexp(expected[name], exponent)
    metrics = compute_metrics(np.ldexp(true, exponent), np.ldexp(pred, exponent))
    mape, expected_mape = metrics.pop("mape"), expected.pop("mape")
    assert metrics == pytest.approx(expected, rel=1e-6, abs=0)
    assert mape == pytest.approx(expected_mape, rel=1e-6) or (
        exponent < 0 and mape < 1e-200
    )  # MAPE has a floor for its denominator


def test_the_largest_and_smallest_floats_are_computed() -> None:
    largest, smallest = np.finfo(np.float64).max, 5e-324
    np.testing.assert_allclose(
        row_smape([largest, largest, smallest, smallest, 1e300], [-largest, largest, 0, smallest, 1e-300]),
        [200, 0, 200, 0, 200],
    )
    assert compute_metrics([1e300, 2e300], [1e300, 2e300]) == {"smape": 0, "mae": 0, "rmse": 0, "mape": 0, "r2": 1}
    assert compute_metrics([largest] * 4, [0] * 4)["mae"] == pytest.approx(largest)
    assert compute_metrics([largest] * 4, [-largest] * 4)["mape"] == pytest.approx(200)


@pytest.mark.parametrize(("true", "pred"), [([5, 5, 5], [5, 5, 5]), ([0.1] * 3, [0.1, 0.2, 0.1]), ([1, 2], [2, 1])])
def test_r2_follows_scikit_learn_for_constant_targets(true: list[float], pred: list[float]) -> None:
    reference = sklearn.metrics.r2_score(np.round(np.array(true) * 10), np.round(np.array(pred) * 10))
    assert compute_metrics(true, pred)["r2"] == pytest.approx(reference)


def test_r2_of_one_row_is_nan_and_nan_and_infinity_are_propagated() -> None:
    metrics = compute_metrics([10.0], [30.0])
    assert math.isnan(metrics.pop("r2"))
    assert metrics == pytest.approx({"smape": 100, "mae": 20, "rmse": 20, "mape": 200})
    assert all(math.isnan(value) for value in compute_metrics([1.0, 2.0, 3.0], [1.0, math.nan, 3.0]).values())
    assert math.isnan(compute_smape([1.0, 2.0], [1.0, math.inf]))
    assert not math.isfinite(compute_metrics([1.0, 2.0], [1.0, math.inf])["mae"])


@pytest.mark.parametrize("function", [row_smape, compute_smape, compute_metrics, group_metrics])
def test_rejects_different_shapes(function: Any) -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        function([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"\(2,\) and \(2, 1\)"):
        function([1, 2], [[1], [2]])


def test_empty_input_is_an_error_and_nan_for_groups() -> None:
    for function in (compute_smape, compute_metrics):
        with pytest.raises(ValueError, match="at least one row"):
            function([], [])
    empty = group_metrics([], [])
    assert empty.keys() == group_metrics([1, 2], [1, 3]).keys()
    assert all(math.isnan(value) for value in empty.values())


def test_group_metrics_extend_the_metrics() -> None:
    true, pred = draw_prices()
    metrics = group_metrics(true, pred)
    expected = compute_metrics(true, pred) | {
        "median_error": sklearn.metrics.median_absolute_error(true, pred),
        "bias": np.mean(pred - true),
        "mean_true": true.mean(),
        "mean_pred": pred.mean(),
    }
    assert metrics == pytest.approx(expected, rel=1e-9)
    huge = group_metrics([1e308] * 4, [1.5e308] * 4)
    assert (huge["median_error"], huge["bias"], huge["mean_pred"]) == pytest.approx((5e307, 5e307, 1.5e308))


def test_bootstrap_interval_agrees_with_the_standard_error() -> None:
    values = np.random.default_rng(0).exponential(10, 4000)
    low, high = bootstrap_interval(values)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.15 * half_width)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high
    assert bootstrap_interval(values, n_resamples=50) == bootstrap_interval(values, n_resamples=50)
    assert bootstrap_interval(values, n_resamples=50) != bootstrap_interval(values, n_resamples=50, seed=1)


def test_bootstrap_interval_handles_few_rows_and_rejects_wrong_settings() -> None:
    assert bootstrap_interval(np.array([12.5])) == (12.5, 12.5)
    assert np.isnan(bootstrap_interval(np.array([]))).all()
    for settings in ({"n_resamples": 0}, {"level": 1.0}):
        with pytest.raises(ValueError, match="n_resamples"):
            bootstrap_interval(np.ones(3), **settings)


@pytest.mark.parametrize("n_rows", [4000, 20_000])
def test_bootstrap_keeps_only_a_few_resamples_in_memory(n_rows: int) -> None:
    values = np.ones(n_rows)
    tracemalloc.start()
    bootstrap_interval(values, n_resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, "a matrix of all resamples would be 200 times the values: 6 or 32 MB"


def test_the_bootstrap_interval_of_many_rows_is_the_normal_approximation() -> None:
    values = np.random.default_rng(0).exponential(10, 6000)
    low, high = bootstrap_interval(values)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=1e-4)


def test_displayed_numbers_keep_significant_digits() -> None:
    shown = [readable(value) for value in (19.989, 0.1, 123456.7, -1234.5, 0.0, 0.000123, -0.004)]
    assert shown == ["19.99", "0.10", "123,457", "-1,234", "0.00", "0.00012", "-0.004"]


def test_metrics_do_not_import_torch() -> None:
    code = "import sys, fusion.metrics; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
