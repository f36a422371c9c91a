"""The price bins of evaluations and reports."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

# Edges in dollars of the column `price_bin`. Bins are narrower at low prices, where a shop has most of its products.
BINS = (0, 5, 10, 15, 20, 30, 50, 100, 200, 500, np.inf)
BIN_NAMES = [f"{low:g}-{high:g}" if np.isfinite(high) else f"{low:g}+" for low, high in itertools.pairwise(BINS)]
OUTSIDE = "outside"  # the group of prices in no bin, which are negative or NaN


def price_bins(prices: pd.Series) -> pd.Series:
    """Returns the name of each price's bin, whose lower edge is inclusive; "outside" for a price in no bin."""
    return binned(prices, BINS, BIN_NAMES)


def binned(prices: pd.Series, edges: Sequence[float], names: list[str]) -> pd.Series:
    """Returns the name of the bin of each price, as `price_bins` does, for any edges."""
    cut = pd.cut(prices, list(edges), right=False, labels=names)
    return cut.astype("object").where(cut.notna(), OUTSIDE)
