"""The metrics that training, evaluation and reports share.

Every function takes lists, NumPy arrays or torch tensors of any real dtype, and computes in float64. Shapes must be
equal: `[N]` with `[N, 1]` is an error, because NumPy would broadcast the two to `[N, N]`. A NaN in the input makes the
metric NaN.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Above this number of rows, an interval is computed from the normal distribution instead of by resampling. The mean of
# 5000 errors, each between 0 and 200%, is close to normal (its skewness is about 0.02), and resampling 2 million rows a
# thousand times would take half a minute per grouping.
BOOTSTRAP_ROWS = 5000
# Values resampled per NumPy call: few enough to need little memory, many enough that small groups need few calls.
BOOTSTRAP_VALUES = 50_000
# `readable` shows no decimals from LARGE on, where they do not matter, and two significant digits below TINY, where two
# decimals would show too little: 0.004 would be "0.00".
LARGE, TINY = 1000, 0.1
_EPSILON = float(np.finfo(np.float64).eps)  # scikit-learn's MAPE divides by this where the true value is smaller


def row_smape(y_true: object, y_pred: object) -> FloatArray:
    """SMAPE of each row in percent, 0 to 200, shape `[N]`: `100 * |p - a| / ((|a| + |p|) / 2)`, with 0/0 as 0.

    Makridakis (1993), "Accuracy measures: theoretical and practical concerns". ValueError if the shapes differ.
    """
    true, pred = _aligned(y_true, y_pred)
    # Scaling by a power of two is exact. It brings values such as 1e300 or 1e-300 near 1, where sums neither overflow
    # nor underflow.
    _, exponent = np.frexp(np.maximum(np.abs(true), np.abs(pred)))
    true, pred = np.ldexp(true, -exponent), np.ldexp(pred, -exponent)
    total = np.abs(true) + np.abs(pred)
    with np.errstate(invalid="ignore"):  # the SMAPE of an infinite price is NaN, without a warning
        smape: FloatArray = np.divide(200 * np.abs(pred - true), total, out=np.zeros_like(total), where=total != 0)
    return smape


def compute_smape(y_true: object, y_pred: object) -> float:
    """The mean of `row_smape`, in percent. ValueError if the shapes differ or there are no rows."""
    return float(_required(row_smape(y_true, y_pred)).mean())


def compute_metrics(y_true: object, y_pred: object) -> dict[str, float]:
    """SMAPE and MAPE in percent, MAE and RMSE in the unit of the input, and R².

    MAPE and R² follow scikit-learn: MAPE divides by `max(|a|, 2.2e-16)`. If all true values are equal, R² is 1 for a
    perfect prediction and 0 otherwise; for a single row it is NaN. ValueError if the shapes differ or there are no
    rows.
    """
    true, pred = _aligned(y_true, y_pred)
    smape = compute_smape(true, pred)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scaled_true, scaled_pred, exponent = _scaled(true, pred)
        error = np.abs(scaled_pred - scaled_true)
        return {
            "smape": smape,
            "mae": float(np.ldexp(error.mean(), exponent)),
            "rmse": float(np.ldexp(np.sqrt(np.mean(error**2)), exponent)),
            "mape": _mape(true, pred),
            "r2": _r2(scaled_true, scaled_pred),
        }


def group_metrics(y_true: object, y_pred: object) -> dict[str, float]:
    """`compute_metrics` plus `median_error`, `bias`, `mean_true` and `mean_pred`, in the unit of the input.

    The median error is the median of |p - a|, the bias is the mean of p - a. For a group without rows, all metrics are
    NaN. ValueError if the shapes differ.
    """
    true, pred = _aligned(y_true, y_pred)
    if true.size == 0:
        return dict.fromkeys(_GROUP_METRICS, float("nan"))
    metrics = compute_metrics(true, pred)
    with np.errstate(over="ignore", invalid="ignore"):
        true, pred, exponent = _scaled(true, pred)
        centres = {
            "median_error": np.median(np.abs(pred - true)),
            "bias": np.mean(pred - true),
            "mean_true": true.mean(),
            "mean_pred": pred.mean(),
        }
        return metrics | {name: float(np.ldexp(value, exponent)) for name, value in centres.items()}


def bootstrap_interval(
    values: FloatArray, n_resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron, 1979) of the mean of `values`, one value per row, shape `[N]`.

    Above `BOOTSTRAP_ROWS` rows, the interval is that of the normal distribution, to which the bootstrap interval
    converges. The same seed gives the same interval. Without rows, the result is (NaN, NaN). ValueError if
    `n_resamples` < 1 or `level` is not in (0, 1).
    """
    if n_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"expected n_resamples >= 1 and 0 < level < 1, however: {n_resamples=}, {level=}")
    rows = _as_float64(values).reshape(-1)
    if rows.size == 0:
        return float("nan"), float("nan")
    if rows.size > BOOTSTRAP_ROWS:
        half = NormalDist().inv_cdf((1 + level) / 2) * float(rows.std()) / rows.size**0.5
        return float(rows.mean()) - half, float(rows.mean()) + half
    generator = np.random.default_rng(seed)
    at_once = max(1, BOOTSTRAP_VALUES // rows.size)
    counts = [min(at_once, n_resamples - done) for done in range(0, n_resamples, at_once)]
    means = [rows[generator.integers(0, rows.size, (count, rows.size))].mean(axis=1) for count in counts]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def readable(value: float) -> str:
    """A number as text for tables and sentences: two decimals, or none if it is large, or two digits if it is tiny.

    >>> [readable(value) for value in (19.99, 123456.7, 0.0, 0.000123)]
    ['19.99', '123,457', '0.00', '0.00012']
    """
    if abs(value) >= LARGE:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < abs(value) < TINY else f"{value:.2f}"


_GROUP_METRICS = ("smape", "mae", "rmse", "mape", "r2", "median_error", "bias", "mean_true", "mean_pred")


def _as_float64(values: object) -> FloatArray:
    if hasattr(values, "detach"):  # a tensor; isinstance would need to import torch
        values = values.detach().cpu().double().numpy()  # NumPy has no bfloat16
    return np.asarray(values, dtype=np.float64)


def _aligned(y_true: object, y_pred: object) -> tuple[FloatArray, FloatArray]:
    true, pred = _as_float64(y_true), _as_float64(y_pred)
    if true.shape != pred.shape:
        raise ValueError(f"y_true and y_pred must have the same shape, however: {true.shape} and {pred.shape}")
    return true.reshape(-1), pred.reshape(-1)


def _required(rows: FloatArray) -> FloatArray:
    if rows.size == 0:
        raise ValueError("a metric needs at least one row, however: y_true and y_pred have shape (0,)")
    return rows


def _scaled(true: FloatArray, pred: FloatArray) -> tuple[FloatArray, FloatArray, int]:
    """Both arrays divided by 2**exponent, and the exponent. The largest value is then near 1; its square is finite."""
    _, exponent = np.frexp(max(np.abs(true).max(), np.abs(pred).max()))
    return np.ldexp(true, -exponent), np.ldexp(pred, -exponent), int(exponent)


def _mape(true: FloatArray, pred: FloatArray) -> float:
    half_error = np.abs(pred / 2 - true / 2)  # halved first, so that the difference of finite numbers stays finite
    return float(200 * np.mean(half_error / np.maximum(np.abs(true), _EPSILON)))


def _r2(true: FloatArray, pred: FloatArray) -> float:
    if true.size < 2:
        return float("nan")
    residual = np.sum((true - pred) ** 2)
    if true.min() == true.max():
        return 1.0 if residual == 0 else 0.0
    return float(1 - residual / np.sum((true - true.mean()) ** 2))
