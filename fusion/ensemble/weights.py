"""Fits convex weights of several models on out-of-fold predictions, and estimates the SMAPE of the weighted mean.

The price of the ensemble is `exp(sum_m w_m log p_m)`. Its SMAPE on the rows that the weights were fitted on would be
too low. Therefore it is cross-validated: weights that were fitted on four fifths of the groups of near-duplicates
predict the remaining fifth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from fusion.compare.standard_errors import Estimate, IntArray, clustered_mean
from fusion.metrics import FloatArray, row_smape

N_PARTS = 5  # of the cross-validation; there are few weights, so more parts would hardly change the estimate
DIGITS = 4  # decimals of a weight; further ones depend on the machine, and do not change the SMAPE visibly


@dataclass(frozen=True)
class Blend:
    """The weights of M members, and estimates of their SMAPE, in percent, on all n rows.

    Attributes:
        weights: [M] not negative, with a sum of 1.
        fitted: True if fitted weights are used; False if equal weights are, because fitted ones were not better by more
            than twice the standard error.
        log_prices: [n] predictions of the ensemble. With fitted weights, those of a row come from weights that were
            fitted without its group.
        smape: SMAPE of `log_prices`.
        gain: SMAPE of equal weights minus that of fitted ones, cross-validated; positive if fitted ones are better.
        over_best: SMAPE of the best member minus `smape`; positive if the ensemble is better.
        members: SMAPE of each member alone.
    """

    weights: FloatArray
    fitted: bool
    log_prices: FloatArray
    smape: Estimate
    gain: Estimate
    over_best: Estimate
    members: list[Estimate]


def blend(log_predicted: FloatArray, log_prices: FloatArray, groups: IntArray) -> Blend:
    """Fits weights, and uses them if they are significantly better than equal ones.

    Args:
        log_predicted: [M, n] out-of-fold predictions of the log price.
        log_prices: [n] true values.
        groups: [n] groups of near-duplicates. A group is never divided between parts of the cross-validation, and is
            one unit in standard errors.
    """
    equal_weights = np.full(len(log_predicted), 1 / len(log_predicted))
    with_equal = equal_weights @ log_predicted
    with_fitted = _cross_validated(log_predicted, log_prices, groups)
    gain = clustered_mean(_smape(with_equal, log_prices) - _smape(with_fitted, log_prices), groups)
    fitted = gain.mean > 0 and gain.is_significant
    of_members = np.stack([_smape(one, log_prices) for one in log_predicted])
    of_best = of_members[of_members.mean(axis=1).argmin()]
    chosen = with_fitted if fitted else with_equal
    of_ensemble = _smape(chosen, log_prices)
    return Blend(
        fitted_weights(log_predicted, log_prices) if fitted else equal_weights,
        fitted,
        chosen,
        clustered_mean(of_ensemble, groups),
        gain,
        clustered_mean(of_best - of_ensemble, groups),
        [clustered_mean(smape, groups) for smape in of_members],
    )


def _cross_validated(log_predicted: FloatArray, log_prices: FloatArray, groups: IntArray) -> FloatArray:
    """Returns [n] log prices, those of each part of the rows with weights that were fitted on the other parts."""
    parts = _parts(groups)
    mixed = np.empty(len(log_prices))
    for part in range(N_PARTS):
        inside = parts == part
        weights = fitted_weights(log_predicted[:, ~inside], log_prices[~inside])
        mixed[inside] = weights @ log_predicted[:, inside]
    return mixed


def _parts(groups: IntArray) -> IntArray:
    """Returns the part [n] of each row. Groups are assigned at random, with a fixed seed, and never divided."""
    _, codes = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(0).permutation(int(codes.max()) + 1) % N_PARTS
    return np.asarray(drawn[codes], np.int64)


def fitted_weights(log_predicted: FloatArray, log_prices: FloatArray) -> FloatArray:
    """Returns the convex weights [M], rounded to `DIGITS` decimals, that minimise the SMAPE.

    With log prices, SMAPE is the mean of `200 tanh(|log p - log a| / 2)`.
    """
    n_models = len(log_predicted)

    def smape(weights: FloatArray) -> tuple[float, FloatArray]:
        """Returns the SMAPE and its gradient [M]."""
        error = weights @ log_predicted - log_prices
        tanh = np.tanh(np.abs(error) / 2)
        slope = 100 * (1 - tanh**2) * np.sign(error)
        return 200 * float(tanh.mean()), log_predicted @ slope / len(error)

    found = minimize(
        smape,
        np.full(n_models, 1 / n_models),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * n_models,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like},
    )
    # The solver may leave the bounds by its tolerance. After rounding, the largest weight is adjusted such that the sum
    # is 1.
    positive = np.clip(found.x, 0, None)
    weights = np.round(positive / positive.sum(), DIGITS)
    weights[weights.argmax()] += 1 - weights.sum()
    return np.asarray(np.round(weights, DIGITS))


def _smape(log_predicted: FloatArray, log_prices: FloatArray) -> FloatArray:
    return row_smape(np.exp(log_prices), np.exp(log_predicted))
