"""Which sets of sources a model is asked with, and the Shapley value of each source from what it says.

The Shapley value of a source (Shapley, 1953) is what it adds to a set of others, averaged over the orders in which the
sources can be joined: `phi_s = sum_T |T|! (S - |T| - 1)! / S! (v(T with s) - v(T))`. The values of all sources add up
to what all of them together are worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import factorial

import numpy as np

from fusion.metrics import FloatArray

MOST_EXACT = 6  # sources whose sets are all asked: 64; more are sampled
N_ORDERS = 20  # of sources, drawn where they are sampled; each is asked backwards as well, which halves the error


@dataclass(frozen=True)
class Coalitions:
    """Sets of S sources, as bits: bit s says that source s is in it.

    Attributes:
        sets: [C] the sets that are asked, the empty one first, that of all sources last.
        shapley: [S, C] coefficients: `values [C] @ shapley[s]` is the Shapley value of s.
    """

    n_sources: int
    sets: list[int]
    shapley: FloatArray

    def column(self, coalition: int) -> int:
        """Its position in `sets`."""
        return self.sets.index(coalition)

    @property
    def everything(self) -> int:
        return (1 << self.n_sources) - 1


def coalitions(n_sources: int) -> Coalitions:
    """All sets of up to `MOST_EXACT` sources; of more, those along random orders, of one source, and of all but one."""
    exact = n_sources <= MOST_EXACT
    return _all_sets(n_sources) if exact else _sampled(n_sources, np.random.default_rng(0))


def _all_sets(n_sources: int) -> Coalitions:
    sets = list(range(1 << n_sources))
    shapley = np.zeros((n_sources, len(sets)))
    for source in range(n_sources):
        for one in sets:
            if not one >> source & 1:
                size = one.bit_count()
                weight = factorial(size) * factorial(n_sources - size - 1) / factorial(n_sources)
                shapley[source, one | 1 << source] += weight
                shapley[source, one] -= weight
    return Coalitions(n_sources, sets, shapley)


def _sampled(n_sources: int, generator: np.random.Generator) -> Coalitions:
    drawn = [generator.permutation(n_sources) for _ in range(N_ORDERS)]
    orders = [*drawn, *(order[::-1] for order in drawn)]
    chains = [np.concatenate([[0], np.cumsum(1 << order)]).tolist() for order in orders]
    everything = (1 << n_sources) - 1
    single = [1 << source for source in range(n_sources)]
    asked = {one for chain in chains for one in chain} | {0, everything}
    sets = sorted(asked.union(single, (everything ^ one for one in single)))
    columns = {one: column for column, one in enumerate(sets)}
    shapley = np.zeros((n_sources, len(sets)))
    for order, chain in zip(orders, chains, strict=True):
        for source, (before, after) in zip(order, pairwise(chain), strict=True):
            shapley[source, columns[after]] += 1 / len(orders)
            shapley[source, columns[before]] -= 1 / len(orders)
    return Coalitions(n_sources, sets, shapley)
