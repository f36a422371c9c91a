"""Means, with standard errors, over rows that are not independent.

Near-duplicates have similar errors, so groups of them, and not rows, are the independent units of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import stdtrit

from fusion.metrics import FloatArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and confidence interval, which are None if there are fewer than 2 groups."""

    mean: float
    error: float | None
    low: float | None
    high: float | None

    @property
    def is_significant(self) -> bool:
        """Whether the mean differs from 0 by more than twice its standard error, about the 5% level."""
        return self.error is not None and abs(self.mean) > 2 * self.error


def clustered_mean(values: FloatArray, groups: NDArray[np.integer], level: float = 0.95) -> Estimate:
    """Returns the mean of values [n], with a cluster-robust standard error: values of a group [n] may be dependent.

    With G groups, `error^2 = G/(G-1) sum_g (sum_{i in g} (v_i - mean))^2 / n^2` (Liang and Zeger, 1986). The interval
    is that of Student's t distribution with G - 1 degrees of freedom. If each row is its own group, the error is the
    usual `std / sqrt(n)`.

    Raises:
        ValueError: there are no values, or the number of groups is not that of values.
    """
    if not len(values) or len(values) != len(groups):
        raise ValueError(f"expected a group per value, however: {len(values)=}, {len(groups)=}")
    mean = float(np.mean(values))
    _, codes = np.unique(groups, return_inverse=True)
    sums = np.bincount(codes, values - mean)
    if len(sums) < 2:
        return Estimate(mean, None, None, None)
    error = float(np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / len(values))
    half = error * float(stdtrit(len(sums) - 1, (1 + level) / 2))
    return Estimate(mean, error, mean - half, mean + half)


def smape_interval(errors: FloatArray, groups: NDArray[np.integer] | None = None) -> tuple[float, float] | None:
    """95% interval of a SMAPE, from `clustered_mean`, not below 0; None if there are fewer than two groups.

    Args:
        errors: [n] SMAPE of each row, in %.
        groups: [n] rows of one group are near-duplicates; None: all rows are independent.
    """
    if not len(errors):
        return None
    found = clustered_mean(errors, np.arange(len(errors)) if groups is None else groups)
    return None if found.low is None or found.high is None else (max(0.0, found.low), found.high)


def joined_groups(groupings: Sequence[NDArray[np.integer]]) -> IntArray:
    """Merges groupings, each [n], of the same rows.

    Two rows are in the same group of the result, [n], if any of the groupings connects them, directly or through other
    rows.
    """
    # The graph's nodes are the rows, followed by the groups of all groupings; its edges connect rows with their groups.
    n_rows, links = len(groupings[0]), []
    offset = n_rows
    for grouping in groupings:
        _, codes = np.unique(grouping, return_inverse=True)
        links.append(codes + offset)
        offset += len(codes)
    rows, nodes = np.tile(np.arange(n_rows), len(groupings)), np.concatenate(links)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, nodes)), shape=(offset, offset))
    _, component = connected_components(graph, directed=False)
    _, joined = np.unique(component[:n_rows], return_inverse=True)
    return np.asarray(joined, np.int64)
