"""Comparable products of an ensemble: the labelled products that weigh most in each of its prices.

The weight of a product is the sum, over the members, of the member's weight times the product's weight in that member.

B is the number of rows, n of products listed per row, R of products listed per row by all members together, and N of
rows in a member's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from fusion.nn.price_model import N_COMPARABLES, PriceModel

# Products that each member lists per row before they are merged. Further ones have hardly any weight, and are left out
# of the sums. It is more than `N_COMPARABLES`, since a product may have a small weight in each of several members.
N_MERGED = 32


def all_named(models: Sequence[PriceModel]) -> pd.Series:
    """Returns the price in dollars, by sample id, of each product in the memory of any of the models."""
    named = [model.named_rows for model in models if len(model.named_rows)]
    everything = pd.concat(named) if named else pd.Series(dtype=float)
    return everything[~everything.index.duplicated()]


def positions_among(known: pd.Series, models: Sequence[PriceModel], device: torch.device) -> list[Tensor]:
    """Returns, for each model, the positions [N] in `known` of the rows of its memory.

    Also sets each model to list `N_MERGED` comparable products per row.

    Args:
        known: as of `all_named`.
    """
    for model in models:
        model.n_comparables = N_MERGED
    return [torch.from_numpy(known.index.get_indexer(model.named_rows.index)).to(device) for model in models]


def merged(
    outputs: Sequence[Mapping[str, Tensor]], weights: Sequence[float], positions: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Returns "comparable_rows" and "comparable_weights", both [B, n], with the largest weight first.

    The rows are positions among all known products. The result is empty if no member has comparable products.

    Args:
        outputs: of each member, for the B rows.
        weights: of the members.
        positions: as of `positions_among`.
    """
    with_neighbours = [
        member for member in zip(outputs, weights, positions, strict=True) if "comparable_rows" in member[0]
    ]
    if not with_neighbours:
        return {}
    n = min(N_COMPARABLES, max(output["comparable_rows"].shape[1] for output, _, _ in with_neighbours))
    rows = torch.cat([known[output["comparable_rows"]] for output, _, known in with_neighbours], dim=1)
    shares = torch.cat([weight * output["comparable_weights"].double() for output, weight, _ in with_neighbours], dim=1)
    rows, shares = _summed(rows, shares)
    heaviest, columns = shares.topk(n, dim=1)
    return {"comparable_rows": rows.gather(1, columns), "comparable_weights": heaviest.float()}


def _summed(rows: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Merges equal products in each row of [B, R], and sums their shares.

    The result has the same shape. The columns that are left over at the end have a share of -1, so that they come after
    all products.
    """
    rows, order = rows.sort(dim=1, stable=True)
    is_first = torch.ones_like(rows, dtype=torch.bool)
    is_first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    column = is_first.cumsum(1) - 1  # of the merged product
    sums = torch.zeros_like(shares).scatter_add(1, column, shares.gather(1, order))
    is_left_over = torch.arange(rows.shape[1], device=rows.device) > column[:, -1:]
    return torch.zeros_like(rows).scatter(1, column, rows), sums.masked_fill(is_left_over, -1.0)
