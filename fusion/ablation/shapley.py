"""Chooses the sets of sources (coalitions) that are computed, and the coefficients of the Shapley values.

The Shapley value of source s among S sources (Shapley, 1953) is how much it changes the value v of a set T of other
sources, averaged over all orders in which sources can be added:
`phi_s = sum_T |T|! (S - |T| - 1)! / S! (v(T with s) - v(T))`. The Shapley values of all sources add up to the value of
the set of all sources minus that of the empty set.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import factorial

import numpy as np

from fusion.metrics import FloatArray

MOST_EXACT = 6  # up to this number of sources, all sets are computed: at most 64
# For more sources, Shapley values are averages over this many random orders of the sources and the same orders
# reversed. Pairs of opposite orders have about half the error of as many independent orders.
N_ORDERS = 20


@dataclass(frozen=True)
class Coalitions:
    """C sets of S sources. A set is an integer whose bit s is 1 if source s is in the set.

    Attributes:
        sets: [C] the sets to compute; the first is empty, and the last contains all sources.
        shapley: [S, C] coefficients: `values [C] @ shapley[s]` is the Shapley value of source s.
    """

    n_sources: int
    sets: list[int]
    shapley: FloatArray

    def column(self, coalition: int) -> int:
        """Returns the position of a set in `sets`."""
        return self.sets.index(coalition)

    @property
    def everything(self) -> int:
        """The set of all sources."""
        return (1 << self.n_sources) - 1


def coalitions(n_sources: int) -> Coalitions:
    """Returns all sets of up to `MOST_EXACT` sources.

    For more sources, returns the sets that random orders of the sources pass through, each single source, and all
    sources without each one.
    """
    exact = n_sources <= MOST_EXACT
    return _all_sets(n_sources) if exact else _sampled(n_sources, np.random.default_rng(0))


def _all_sets(n_sources: int) -> Coalitions:
    sets = list(range(1 << n_sources))
    shapley = np.zeros((n_sources, len(sets)))
    for source in range(n_sources):
        for others in sets:
            if not others >> source & 1:  # the set does not contain the source
                size = others.bit_count()
                weight = factorial(size) * factorial(n_sources - size - 1) / factorial(n_sources)
                shapley[source, others | 1 << source] += weight
                shapley[source, others] -= weight
    return Coalitions(n_sources, sets, shapley)


def _sampled(n_sources: int, generator: np.random.Generator) -> Coalitions:
    drawn = [generator.permutation(n_sources) for _ in range(N_ORDERS)]
    orders = [*drawn, *(order[::-1] for order in drawn)]
    # The sets that an order passes through, from the empty set to that of all sources.
    chains = [np.concatenate([[0], np.cumsum(1 << order)]).tolist() for order in orders]
    everything = (1 << n_sources) - 1
    single = [1 << source for source in range(n_sources)]
    all_but_one = [everything ^ one for one in single]
    on_chains = {one for chain in chains for one in chain}
    sets = sorted(on_chains | {0, everything, *single, *all_but_one})
    columns = {one: column for column, one in enumerate(sets)}
    shapley = np.zeros((n_sources, len(sets)))
    for order, chain in zip(orders, chains, strict=True):
        for source, (before, after) in zip(order, pairwise(chain), strict=True):
            shapley[source, columns[after]] += 1 / len(orders)
            shapley[source, columns[before]] -= 1 / len(orders)
    return Coalitions(n_sources, sets, shapley)
