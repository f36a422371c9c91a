from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from fusion.ablation.shapley import coalitions


def by_definition(values: dict[int, float], n_sources: int) -> list[float]:
    """What each source adds, averaged over all orders."""
    total = np.zeros(n_sources)
    orders = list(permutations(range(n_sources)))
    for order in orders:
        joined = 0
        for source in order:
            total[source] += values[joined | 1 << source] - values[joined]
            joined |= 1 << source
    return list(total / len(orders))


@pytest.mark.parametrize("n_sources", [1, 2, 3, 5])
def test_shapley_values_are_those_of_their_definition(n_sources: int) -> None:
    found = coalitions(n_sources)
    assert found.sets == list(range(1 << n_sources))
    values = np.random.default_rng(0).normal(40, 10, len(found.sets))
    shapley = found.shapley @ values
    assert list(shapley) == pytest.approx(by_definition(dict(zip(found.sets, values, strict=True)), n_sources))
    assert shapley.sum() == pytest.approx(values[-1] - values[0])


def test_many_sources_are_sampled_and_add_up_all_the_same() -> None:
    found = coalitions(9)
    assert len(found.sets) < 1 << 9 and found.sets[0] == 0 and found.sets[-1] == found.everything == 511
    for source in range(9):
        assert found.sets[found.column(1 << source)] == 1 << source
        assert found.sets[found.column(511 ^ 1 << source)] == 511 ^ 1 << source
    worth = np.array([5.0, 3, 2, 1, 0, 0, 0, 0, 0])

    def value(one: int) -> float:
        """Adds up, and the first two are worth 4 more together: half of it each."""
        return float(sum(worth[s] for s in range(9) if one >> s & 1) + 4 * (one & 3 == 3))

    shapley = found.shapley @ np.array([value(one) for one in found.sets])
    assert shapley.sum() == pytest.approx(value(511))
    assert list(shapley) == pytest.approx(worth + np.array([2, 2, 0, 0, 0, 0, 0, 0, 0]))


def test_the_same_sets_are_drawn_every_time() -> None:
    assert coalitions(8).sets == coalitions(8).sets
