from __future__ import annotations

import numpy as np
import pytest

from fusion.compare.standard_errors import clustered_mean, joined_groups


def test_independent_rows_have_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(40, 30, 500)
    found = clustered_mean(values, np.arange(500))
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / 500**0.5)
    assert (found.high or 0) - found.mean == pytest.approx(1.9647 * found.error, rel=1e-3)


def test_copies_of_rows_do_not_reduce_the_error() -> None:
    values = np.random.default_rng(0).normal(40, 30, 500)
    once, copied = (
        clustered_mean(values, np.arange(500)),
        clustered_mean(np.repeat(values, 4), np.repeat(range(500), 4)),
    )
    assert copied.error == pytest.approx(once.error) and copied.mean == pytest.approx(once.mean)


def test_the_interval_covers_the_mean_in_95_percent_of_samples() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), rng.integers(1, 8, 60))
    hits = 0
    for _ in range(1000):
        values = rng.normal(5, 1, 60)[groups] + rng.normal(0, 1, len(groups))
        found = clustered_mean(values, groups)
        hits += (found.low or 0) < 5 < (found.high or 0)
    assert 925 < hits < 970


def test_one_group_has_no_error() -> None:
    found = clustered_mean(np.arange(5.0), np.zeros(5, int))
    assert found.mean == 2 and found.error is None and not found.is_significant
    with pytest.raises(ValueError, match="a group per value"):
        clustered_mean(np.arange(5.0), np.zeros(4, int))


def test_groups_are_merged_through_any_grouping() -> None:
    joined = joined_groups([np.array([0, 0, 1, 2, 3]), np.array([5, 6, 6, 7, 7])])
    assert joined.tolist() == [0, 0, 0, 1, 1]
    assert joined_groups([np.array([3, 1, 3])]).tolist() in ([0, 1, 0], [1, 0, 1])
