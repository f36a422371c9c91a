"""The best convex blend of out-of-fold predictions."""

from __future__ import annotations

import numpy as np

from fusion.ensemble.weights import fitted_weights


def nested_blend(logs: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convex blend of out-of-fold predictions. The weights for a fold's rows are fitted on the rows of other folds.

    Args:
        logs: [M, N] log prices predicted by M models.
        targets: [N] log prices.
        folds: [N] fold of each row.

    Returns:
        [N] blended log prices, and [M] the mean of the weights over the folds.
    """
    blended, weights = np.empty(len(targets)), []
    for fold in np.unique(folds):
        mine = folds == fold
        weights.append(fitted_weights(logs[:, ~mine], targets[~mine]))
        blended[mine] = weights[-1] @ logs[:, mine]
    return blended, np.mean(weights, axis=0)
