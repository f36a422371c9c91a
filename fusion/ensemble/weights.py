"""Convex weights of several models, fitted on rows that none of them trained on, and what they are worth on others.

A mixture's price is `exp(sum_m w_m log p_m)`. Its SMAPE on the rows that the weights were fitted on flatters it, so
figures are nested: weights fitted on four fifths of the groups of near-duplicates price the remaining fifth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from fusion.compare.standard_errors import Estimate, IntArray, clustered_mean
from fusion.metrics import FloatArray, row_smape

N_PARTS = 5
DIGITS = 4  # of a weight: what lies below is rounding, and would differ between machines


@dataclass(frozen=True)
class Blend:
    """Weights, and what they are worth; every SMAPE is in %, on all rows.

    Attributes:
        weights: [M] at least 0, of sum 1.
        fitted: whether they were fitted; else they are equal, for fitted ones were not better by twice the error.
        log_prices: [n] of the mixture; each row's, where fitted, by weights that were fitted without its group.
        smape: of `log_prices`.
        gain: of fitted weights, nested, over equal ones: positive where fitted ones are better.
        over_best: of `log_prices` over the best member, likewise.
        members: of each member alone.
    """

    weights: FloatArray
    fitted: bool
    log_prices: FloatArray
    smape: Estimate
    gain: Estimate
    over_best: Estimate
    members: list[Estimate]


def blend(log_predicted: FloatArray, log_prices: FloatArray, groups: IntArray) -> Blend:
    """Weights for models that predict log prices [M, n] where [n] are right.

    Args:
        groups: [n] of near-duplicates, which stay together where parts are drawn and errors are estimated.
    """
    equal = np.full(len(log_predicted), 1 / len(log_predicted))
    nested, even = _nested(log_predicted, log_prices, groups), equal @ log_predicted
    gain = clustered_mean(_smape(even, log_prices) - _smape(nested, log_prices), groups)
    fitted = gain.mean > 0 and gain.is_significant
    errors = np.stack([_smape(one, log_prices) for one in log_predicted])
    chosen = nested if fitted else even
    mine, best = _smape(chosen, log_prices), errors[errors.mean(axis=1).argmin()]
    return Blend(
        fitted_weights(log_predicted, log_prices) if fitted else equal,
        fitted,
        chosen,
        clustered_mean(mine, groups),
        gain,
        clustered_mean(best - mine, groups),
        [clustered_mean(one, groups) for one in errors],
    )


def _nested(log_predicted: FloatArray, log_prices: FloatArray, groups: IntArray) -> FloatArray:
    """[n] log price of each row by weights that were fitted without its part of the groups."""
    parts = _parts(groups)
    mixed = np.empty(len(log_prices))
    for part in range(N_PARTS):
        inside = parts == part
        weights = fitted_weights(log_predicted[:, ~inside], log_prices[~inside])
        mixed[inside] = weights @ log_predicted[:, inside]
    return mixed


def _parts(groups: IntArray) -> IntArray:
    """[n] part of each row: whole groups, drawn at random, always the same."""
    _, codes = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(0).permutation(int(codes.max()) + 1) % N_PARTS
    return np.asarray(drawn[codes], np.int64)


def fitted_weights(log_predicted: FloatArray, log_prices: FloatArray) -> FloatArray:
    """[M] convex weights, in `DIGITS` digits, with the least SMAPE: the mean of `200 tanh(|log p - log a| / 2)`."""
    n_models = len(log_predicted)

    def smape(weights: FloatArray) -> tuple[float, FloatArray]:
        error = weights @ log_predicted - log_prices
        bent = np.tanh(np.abs(error) / 2)
        slope = 100 * (1 - bent**2) * np.sign(error)
        return 200 * float(bent.mean()), log_predicted @ slope / len(error)

    found = minimize(
        smape,
        np.full(n_models, 1 / n_models),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * n_models,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like},
    )
    weights = np.round(np.clip(found.x, 0, None) / np.clip(found.x, 0, None).sum(), DIGITS)
    weights[weights.argmax()] += 1 - weights.sum()
    return np.asarray(np.round(weights, DIGITS))


def _smape(log_predicted: FloatArray, log_prices: FloatArray) -> FloatArray:
    return row_smape(np.exp(log_prices), np.exp(log_predicted))
