"""Ridge regression of log prices on all sources, fitted from sums, so that it never holds more than a block of rows.

The sums of a part of the rows are the products of all pairs of columns, of which the inputs, a constant and the target
are the columns. Sums of parts add up, so that one pass over the rows is enough to fit with each part left out in turn,
and to try several strengths of the penalty on rows that were left out of a fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Strengths of the penalty that are tried. Standardised inputs have sums of squares of about the number of rows, so
# that these go from nearly no penalty for small tables to nearly constant predictions. The error hardly changes within
# a factor of three.
ALPHAS = (1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4, 3e4, 1e5)
USUAL_ALPHA = 1e3  # if there are too few rows to leave some out: the middle of the above


@dataclass(frozen=True)
class Ridge:
    """A fitted regression.

    Attributes:
        weights: [D] float64, of the inputs; an array, so that ranks can send it.
        intercept: the prediction where all inputs are 0.
        alpha: factor of the sum of squared weights in what was minimised.
    """

    weights: np.ndarray
    intercept: float
    alpha: float

    def predict(self, inputs: Tensor) -> Tensor:
        """[n] float64 predictions from inputs [n, D]."""
        return (inputs @ torch.tensor(self.weights).to(inputs)).double() + self.intercept


def sums_of(blocks: Iterable[tuple[Tensor, Tensor, Tensor]], n_inputs: int, n_parts: int) -> Tensor:
    """Returns the sums of each part of the rows, [n_parts, D + 2, D + 2] float64.

    Products are computed in float32 within a block, and added up in float64: then rounding does not grow with the
    number of rows.

    Args:
        blocks: inputs [b, D] float32, target [b] and part [b] of some rows at a time.
        n_inputs: D.
    """
    total = torch.zeros(n_parts, n_inputs + 2, n_inputs + 2, dtype=torch.float64)
    for inputs, target, parts in blocks:
        total = total.to(inputs.device)
        ones = torch.ones_like(inputs[:, :1])
        columns = torch.cat([inputs, ones, target.to(inputs).unsqueeze(1)], dim=1)
        for part in range(n_parts):
            rows = columns[parts == part]
            total[part] += rows.T @ rows
    return total


def fit(training: Tensor, held_out: Tensor) -> Ridge:
    """Fits with the strength that predicts rows best that are left out; the result is fitted to them too.

    Args:
        training, held_out: sums [D + 2, D + 2] of the rows of both, at least one row together.
    """
    usable = float(training[-2, -2]) > 0 and float(held_out[-2, -2]) > 0
    errors = {alpha: _error(_fitted(training, alpha), held_out) for alpha in ALPHAS} if usable else {USUAL_ALPHA: 0.0}
    return _fitted(training + held_out, min(errors, key=lambda alpha: errors[alpha]))


def _fitted(sums: Tensor, alpha: float) -> Ridge:
    """Minimises the sum of squared errors plus `alpha` times the sum of squared weights; the intercept is free."""
    n_rows, products, with_target = sums[-2, -2], sums[:-2, :-2], sums[:-2, -1]
    means, mean_target = sums[:-2, -2] / n_rows, sums[-2, -1] / n_rows
    centred = products - n_rows * torch.outer(means, means)
    centred.diagonal().add_(alpha)
    right = with_target - n_rows * means * mean_target
    weights = torch.cholesky_solve(right.unsqueeze(1), torch.linalg.cholesky(centred)).squeeze(1)
    return Ridge(weights.numpy(), float(mean_target - means @ weights), alpha)


def _error(found: Ridge, sums: Tensor) -> float:
    """The sum of squared errors of the rows with these sums."""
    # The columns times these numbers are predictions minus targets.
    combined = torch.tensor([*found.weights, found.intercept, -1.0], dtype=torch.float64)
    return float(combined @ sums @ combined)
