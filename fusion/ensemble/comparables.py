"""Comparable products of an ensemble: those of its members, each by the weight that it has in the mixture.

B is the number of rows, n of products that are named, R of those that members name, N of rows that any remembers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from fusion.nn.price_model import N_COMPARABLES, PriceModel

N_MERGED = 32  # products of each member; what lies beyond has next to no weight, and is left out of the sums


def all_named(models: Sequence[PriceModel]) -> pd.Series:
    """Prices in dollars of the products that any of the models remembers, by sample id."""
    named = [model.named_rows for model in models if len(model.named_rows)]
    everything = pd.concat(named) if named else pd.Series(dtype=float)
    return everything[~everything.index.duplicated()]


def places_among(known: pd.Series, models: Sequence[PriceModel], device: torch.device) -> list[Tensor]:
    """For each model, [N] where its rows are among the known ones; it names more products from now on."""
    for model in models:
        model.n_comparables = N_MERGED
    return [torch.from_numpy(known.index.get_indexer(model.named_rows.index)).to(device) for model in models]


def merged(
    found: Sequence[Mapping[str, Tensor]], weights: Sequence[float], places: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The "comparable_rows" and "comparable_weights" [B, n], the weightiest first; nothing if no member names any.

    Args:
        found: what each member says of the rows.
        weights: of the members.
        places: as of `places_among`.
    """
    naming = [part for part in zip(found, weights, places, strict=True) if "comparable_rows" in part[0]]
    if not naming:
        return {}
    n = min(N_COMPARABLES, max(one["comparable_rows"].shape[1] for one, _, _ in naming))
    rows = torch.cat([there[one["comparable_rows"]] for one, _, there in naming], dim=1)
    shares = torch.cat([weight * one["comparable_weights"].double() for one, weight, _ in naming], dim=1)
    rows, shares = _summed(rows, shares)
    heaviest, columns = shares.topk(n, dim=1)
    return {"comparable_rows": rows.gather(1, columns), "comparable_weights": heaviest.float()}


def _summed(rows: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Each row [B, R] once, with the sum of its shares; where the others were, shares of -1."""
    rows, order = rows.sort(dim=1, stable=True)
    is_first = torch.ones_like(rows, dtype=torch.bool)
    is_first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    which = is_first.cumsum(1) - 1
    sums = torch.zeros_like(shares).scatter_add(1, which, shares.gather(1, order))
    is_empty = torch.arange(rows.shape[1], device=rows.device) > which[:, -1:]
    return torch.zeros_like(rows).scatter(1, which, rows), sums.masked_fill(is_empty, -1.0)
