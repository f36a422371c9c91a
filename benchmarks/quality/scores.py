"""The best convex blend of predictions."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from benchmarks.quality.fold import log_smape


def nested_blend(logs: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convex blend of out-of-fold predictions: the weights of a fold's rows come from the other folds' rows.

    Args:
        logs: [M, N] log prices that M models predict.
        targets: [N] log prices.
        folds: [N] fold of each row.

    Returns:
        [N] blended log prices, and [M] the mean of the weights over the folds.
    """
    blended, weights = np.empty(len(targets)), []
    for fold in np.unique(folds):
        mine = folds == fold
        weights.append(convex_weights(logs[:, ~mine], targets[~mine]))
        blended[mine] = weights[-1] @ logs[:, mine]
    return blended, np.mean(weights, axis=0)


def convex_weights(logs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[M] weights, at least 0 and of sum 1, of the predictions [M, N] with the lowest SMAPE."""

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        distance = (weights @ logs - targets) / 2
        slope = np.sign(distance) * (1 - np.tanh(np.abs(distance)) ** 2) / 2
        return float(np.tanh(np.abs(distance)).mean()), logs @ slope / len(targets)

    start = np.full(len(logs), 1 / len(logs))
    simplex = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    found = minimize(loss, start, jac=True, method="SLSQP", bounds=[(0, 1)] * len(logs), constraints=simplex).x
    found = found.clip(0) / found.clip(0).sum()
    corners = [*np.eye(len(logs)), found]  # the loss is not convex: no blend is worse than its best member
    return min(corners, key=lambda weights: log_smape(weights @ logs, targets))
