from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from fusion.ablation.shapley import coalitions


def by_definition(values: dict[int, float], n_sources: int) -> list[float]:
    """Shapley values: how much each source adds to the value, averaged over all orders of the sources."""
    total = np.zeros(n_sources)
    orders = list(permutations(range(n_sources)))
    for order in orders:
        joined = 0
        for source in order:
            total[source] += values[joined | 1 << source] - values[joined]
            joined |= 1 << source
    return list(total / len(orders))


@pytest.mark.parametrize("n_sources", [1, 2, 3, 5])
def test_shapley_values_equal_their_definition(n_sources: int) -> None:
    found = coalitions(n_sources)
    assert found.sets == list(range(1 << n_sources))
    values = np.random.default_rng(0).normal(40, 10, len(found.sets))
    shapley = found.shapley @ values
    assert list(shapley) == pytest.approx(by_definition(dict(zip(found.sets, values, strict=True)), n_sources))
    assert shapley.sum() == pytest.approx(values[-1] - values[0])


def test_sampled_shapley_values_add_up() -> None:
    found = coalitions(9)
    assert len(found.sets) < 1 << 9 and found.sets[0] == 0 and found.sets[-1] == found.everything == 511
    for source in range(9):
        assert found.sets[found.column(1 << source)] == 1 << source
        assert found.sets[found.column(511 ^ 1 << source)] == 511 ^ 1 << source
    worth = np.array([5.0, 3, 2, 1, 0, 0, 0, 0, 0])

    def value(one: int) -> float:
        """The sum of the sources' worth, plus 4 if the first two are both there, of which each should get half."""
        return float(sum(worth[s] for s in range(9) if one >> s & 1) + 4 * (one & 3 == 3))

    shapley = found.shapley @ np.array([value(one) for one in found.sets])
    assert shapley.sum() == pytest.approx(value(511))
    assert list(shapley) == pytest.approx(worth + np.array([2, 2, 0, 0, 0, 0, 0, 0, 0]))


def test_the_sampled_sets_are_reproducible() -> None:
    assert coalitions(8).sets == coalitions(8).sets
