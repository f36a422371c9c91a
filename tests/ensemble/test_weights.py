from __future__ import annotations

import numpy as np
import pytest

from fusion.ensemble.weights import blend, fitted_weights


def models(n: int, *noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log predictions [M, n] with independent errors of these deviations, and the log prices [n]."""
    rng = np.random.default_rng(seed)
    prices = rng.normal(3, 1, n)
    return np.stack([prices + rng.normal(0, one, n) for one in noise]), prices


def test_weights_of_independent_errors_are_inverse_variances() -> None:
    predicted, prices = models(20_000, 0.2, 0.4, 2.0)
    weights = fitted_weights(predicted, prices)
    assert weights == pytest.approx([0.79, 0.20, 0.01], abs=0.03)  # 1 / variance, divided by their sum
    assert weights.sum() == pytest.approx(1, abs=1e-12) and (weights >= 0).all()


def test_fitted_weights_minimise_smape() -> None:
    predicted, prices = models(500, 0.3, 0.5, 0.4)
    weights = fitted_weights(predicted, prices)

    def smape(one: np.ndarray) -> float:
        return float(np.tanh(np.abs(one @ predicted - prices) / 2).mean())

    others = np.random.default_rng(1).dirichlet([1, 1, 1], 3000)
    assert smape(weights) <= min(map(smape, others)) + 1e-5


def test_fitted_weights_are_used_only_if_significantly_better() -> None:
    predicted, prices = models(2000, 0.2, 0.8)
    found = blend(predicted, prices, np.arange(2000))
    assert found.fitted and found.weights[0] > 0.8 and found.gain.mean > 0
    predicted, prices = models(2000, 0.4, 0.4, 0.41)
    found = blend(predicted, prices, np.arange(2000))
    assert not found.fitted and found.weights.tolist() == [1 / 3] * 3
    assert found.over_best.mean > 2 and found.over_best.is_significant


def test_estimates_are_cross_validated() -> None:
    """The weights of 50 useless members look better on the rows that they were fitted on than on other rows."""
    predicted, prices = models(150, *[1.0] * 50)
    in_sample = fitted_weights(predicted, prices) @ predicted
    nested = blend(predicted, prices, np.arange(150)).gain.mean
    flattering = (
        np.tanh(np.abs(predicted.mean(0) - prices) / 2) - np.tanh(np.abs(in_sample - prices) / 2)
    ).mean() * 200
    assert nested < 0 < flattering


def test_a_group_is_never_divided() -> None:
    predicted, prices = models(300, 0.3, 0.5)
    thrice, copied = np.repeat(predicted, 3, axis=1), np.repeat(prices, 3)
    once, again = blend(predicted, prices, np.arange(300)), blend(thrice, copied, np.repeat(np.arange(300), 3))
    assert again.smape.mean == pytest.approx(once.smape.mean, abs=1e-3)
    assert again.smape.error == pytest.approx(once.smape.error or 0, rel=1e-2)
