"""Prediction intervals: between which prices 80, 90 and 95% of the true prices lie.

Split conformal prediction (Vovk et al., 2005; Lei et al., 2018) on the validation rows, which no training step saw. The
score of a row is `|log price - log predicted|`, so an interval is a factor by which the price is divided and
multiplied. It is scaled by the model's own spread where there is one. The k-th smallest of the n scores of a bin, with
`k = ceil((n + 1) level)`, covers a new row of that bin with at least that probability, if it is exchangeable with them.
Bins are tiers of the predicted price crossed with categories (Mondrian conformal prediction). Tiers of fewer than 100
rows of a category are one bin together; a category of fewer is one of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from fusion.config import RunConfig
from fusion.data.tables import Table
from fusion.records.manifests import INTERVALS, Checkpoint, read_file
from fusion.records.schemas import SCHEMA, IntervalBin, Intervals, parse

LEVELS = (80, 90, 95)  # percent
LEAST_ROWS = 100  # of a bin: the coverage of 90% is then off by 3 points (one standard error) by chance
FEWEST_ROWS = 20  # of all: of 19 scores, the largest covers 95%, and of fewer none does
N_TIERS = 5
N_SPREADS = 10
MAX_CATEGORIES = 200  # with bins of their own; the largest
CATEGORY = "category"  # the default of --interval-by
OTHERS = ""  # stands for all categories without bins of their own
N_PARTS = 10  # of cross-fitting: with two, bins of 100 to 200 rows would be reported as they never are
SCALE_LEVEL = 0.9  # quantile of the errors that a scale is
SMALLEST_SCALE = 0.05  # of the scale of all rows: rows of no spread at all may have errors of zero
LARGEST_LOG = 700.0  # exp of more leaves float64

FloatArray = np.ndarray
Key = tuple[str | None, int | None]  # of a bin: its category and its tier; None: all


def fit(rows: pd.DataFrame, by: str = "") -> Intervals | None:
    """Intervals from rows that were not trained on; None for fewer than `FEWEST_ROWS`.

    Args:
        rows: price, predicted (dollars), and where there are, spread (any number that grows with the error) and
            category (text).
        by: name of the column that category is.
    """
    if len(rows) < FEWEST_ROWS:
        return None
    edges = _edges(rows["predicted"], min(N_TIERS, len(rows) // LEAST_ROWS))
    made = Intervals(SCHEMA, LEVELS, len(rows), by, (), tuple(edges), (), (), ())
    made = replace(made, categories=_categories(rows)) if "category" in rows else made
    made = _scaled(made, rows) if "spread" in rows else made
    return replace(made, bins=tuple(_bins(made, rows)))


def bounds(intervals: Intervals, rows: pd.DataFrame) -> dict[str, FloatArray]:
    """low_80, high_80, … of each row, [n] dollars, with `low_95 <= low_90 <= low_80 <= predicted <= high_80 <= …`.

    Args:
        rows: predicted, and as for `fit`; a category that is missing or new is one of the others.
    """
    widths = _widths(intervals)[_category_codes(intervals, rows), _tiers(intervals, rows)]  # [n, levels]
    logs = np.minimum(widths * _scales(intervals, rows)[:, None], LARGEST_LOG)
    predicted, limits, found = rows["predicted"].to_numpy(np.float64), np.finfo(np.float64), dict[str, FloatArray]()
    with np.errstate(over="ignore", under="ignore"):
        for place, level in enumerate(intervals.levels):
            factor = np.exp(logs[:, place])
            found[f"low_{level}"] = np.minimum(np.maximum(predicted / factor, limits.tiny), predicted)
            found[f"high_{level}"] = np.maximum(np.minimum(predicted * factor, limits.max), predicted)
    return found


def crossed(rows: pd.DataFrame, groups: np.ndarray, by: str = "") -> dict[str, FloatArray] | None:
    """As `bounds`, each row's from an interval that neither it nor another row of its group has been part of.

    Args:
        rows: as for `fit`.
        groups: [n] near-duplicates, as of the split.
    """
    _, codes = np.unique(groups, return_inverse=True)
    parts = np.random.default_rng(0).permutation(codes.max(initial=0) + 1)[codes] % N_PARTS
    found: dict[str, FloatArray] = {}
    for part in np.unique(parts):
        intervals = fit(rows[parts != part], by)
        if intervals is None:
            return None
        for name, values in bounds(intervals, rows[parts == part]).items():
            found.setdefault(name, np.empty(len(rows)))[parts == part] = values
    return found


def coverage(intervals: Intervals, rows: pd.DataFrame) -> pd.DataFrame:
    """How many prices lie within their bounds: of all rows, by tier of the predicted price and by category.

    Args:
        rows: as for `fit`, with the bounds.

    Returns:
        by, group, count, covered_80, …, error (standard error of the share within 90%, if it is 90%), factor_90.
    """
    levels = [level for level in intervals.levels if f"low_{level}" in rows]
    covered = {f"covered_{level}": is_within(rows, level) for level in levels}
    found = []
    for name, group, chosen in _groups(intervals, rows):
        shares = {column: float(values[chosen].mean()) for column, values in covered.items()}
        error, factor = np.sqrt(0.9 * 0.1 / chosen.sum()), median_factor(rows[chosen])
        found.append({"by": name, "group": group, "count": int(chosen.sum()), **shares, "error": error} | factor)
    return pd.DataFrame(found)


def is_within(rows: pd.DataFrame, level: int) -> np.ndarray:
    """[n] bool: the price lies between the row's bounds."""
    return rows["price"].between(rows[f"low_{level}"], rows[f"high_{level}"]).to_numpy(bool)


def misplaced(rows: pd.DataFrame, price: str) -> int:
    """How many rows have bounds that are not finite, or not in their order around the column `price`.

    Args:
        rows: with all bounds of some levels, of at least one.
    """
    levels = sorted(int(str(name).removeprefix("low_")) for name in rows if str(name).startswith("low_"))
    names = [*(f"low_{level}" for level in reversed(levels)), price, *(f"high_{level}" for level in levels)]
    values = rows[names].to_numpy(np.float64)
    fits = np.isfinite(values).all(axis=1) & (values > 0).all(axis=1) & (np.diff(values, axis=1) >= 0).all(axis=1)
    return int((~fits).sum())


def median_factor(rows: pd.DataFrame, level: int = 90) -> dict[str, float]:
    """{"factor_90": median of the factors that predicted prices are divided and multiplied by}."""
    factors = rows[f"high_{level}"].to_numpy() / rows["predicted"].to_numpy()
    return {f"factor_{level}": float(np.median(factors)) if len(factors) else float("nan")}


def intervals_of(checkpoint: Checkpoint) -> Intervals | None:
    """The intervals of a checkpoint, verified; None if it has none: an earlier version made it, or of too few rows."""
    if not checkpoint.manifest.sha256_of(INTERVALS):
        return None
    return parse(Intervals, read_file(checkpoint, INTERVALS), f"{checkpoint.url}/{INTERVALS}")


def category_column(config: RunConfig) -> str:
    """Name of the column whose values have intervals of their own."""
    return config.interval_by or CATEGORY


def category_of(table: Table, column: str, rows: np.ndarray | slice = slice(None)) -> pd.Series | None:
    """Text of a column, empty where it is missing, of these rows of the table; None if it has no such column."""
    if not column or column not in table.frame:
        return None
    return table.frame[column].iloc[rows].astype("str").fillna(OTHERS).str.strip()


def tier_names(intervals: Intervals) -> list[str]:
    """The tiers in words, such as "below $9.99" and "$9.99 to $20.00"."""
    edges = [f"${edge:,.2f}" if edge >= 0.01 else f"${edge:.2g}" for edge in intervals.tier_edges]
    if not edges:
        return ["any price"]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    return [f"below {edges[0]}", *between, f"from {edges[-1]}"]


def _edges(values: pd.Series, n_bins: int) -> FloatArray:
    """Rising values, each the first of its bin, that part all into `n_bins` of as many; fewer where many are equal."""
    known = values.to_numpy(np.float64)
    edges = np.unique(np.quantile(known, np.arange(1, n_bins) / n_bins, method="higher")) if n_bins > 1 else known[:0]
    found: FloatArray = edges[(edges > known.min()) & np.isfinite(edges)]
    return found


def _categories(rows: pd.DataFrame) -> tuple[str, ...]:
    counts = rows["category"].value_counts()
    large = counts[(counts >= LEAST_ROWS) & (counts.index != OTHERS)].head(MAX_CATEGORIES)
    return tuple(sorted(map(str, large.index)))


def _errors(rows: pd.DataFrame) -> FloatArray:
    price, predicted = (rows[name].to_numpy(np.float64) for name in ("price", "predicted"))
    errors: FloatArray = np.abs(np.log(price) - np.log(predicted))
    return errors


def _scaled(made: Intervals, rows: pd.DataFrame) -> Intervals:
    """With the scale of each bin of the spread: a high quantile of its errors, never below that of a lower bin."""
    spread, errors = rows["spread"].fillna(np.inf), _errors(rows)
    edges = _edges(spread, min(N_SPREADS, len(rows) // LEAST_ROWS))
    smallest = SMALLEST_SCALE * float(np.quantile(errors, SCALE_LEVEL))
    if smallest == 0:
        return made
    codes = np.searchsorted(edges, spread, side="right")
    scales = [max(smallest, float(np.quantile(errors[codes == code], SCALE_LEVEL))) for code in range(len(edges) + 1)]
    return replace(made, spread_edges=tuple(edges), scales=tuple(np.maximum.accumulate(scales)))


def _scales(intervals: Intervals, rows: pd.DataFrame) -> FloatArray:
    """[n] by which the widths of a row are multiplied."""
    if not intervals.scales:
        return np.ones(len(rows))
    codes = np.searchsorted(np.asarray(intervals.spread_edges), rows["spread"], side="right")  # NaN: the last
    return np.asarray(intervals.scales)[codes]


def _tiers(intervals: Intervals, rows: pd.DataFrame) -> np.ndarray:
    """[n] tier of the predicted price, from 0."""
    return np.searchsorted(np.asarray(intervals.tier_edges), rows["predicted"], side="right")


def _category_codes(intervals: Intervals, rows: pd.DataFrame) -> np.ndarray:
    """[n] place of the row's category among `intervals.categories`; the last place is that of the others."""
    others = len(intervals.categories)
    if "category" not in rows:
        return np.full(len(rows), others)
    codes = {category: code for code, category in enumerate(intervals.categories)}
    return rows["category"].map(codes).fillna(others).to_numpy(np.int64)


def _bins(made: Intervals, rows: pd.DataFrame) -> Iterator[IntervalBin]:
    """All rows; those of each tier; and each category's, in parts none of which is of too few.

    A tier of a category is a part if it has enough rows. The other tiers of the category are one part together, which
    the smallest of the former join until it has enough.
    """
    scores, tiers = _errors(rows) / _scales(made, rows), _tiers(made, rows)
    yield from _enough(scores, np.zeros(len(rows), np.int64), [(None, None)], least=0)
    n_tiers = len(made.tier_edges) + 1
    yield from _enough(scores, tiers, [(None, tier) for tier in range(n_tiers)])
    if not made.categories:
        return
    names, categories = [*made.categories, OTHERS], _category_codes(made, rows)
    cells = categories * n_tiers + tiers
    alone = _alone(np.bincount(cells, minlength=len(names) * n_tiers).reshape(len(names), n_tiers)).reshape(-1)
    chosen = alone[cells]
    keys: list[Key] = [(name, tier) for name in names for tier in range(n_tiers)]
    yield from _enough(scores[~chosen], categories[~chosen], [(name, None) for name in names])
    yield from _enough(scores[chosen], cells[chosen], keys)


def _alone(counts: np.ndarray) -> np.ndarray:
    """[categories, tiers] bool: the cell of that many rows is a part of its category by itself."""
    alone: np.ndarray = counts >= LEAST_ROWS
    for row, is_alone in zip(counts, alone, strict=True):
        for tier in np.argsort(row, kind="stable"):
            if 0 < row[~is_alone].sum() < LEAST_ROWS:
                is_alone[tier] = False
    return alone


def _enough(scores: FloatArray, codes: np.ndarray, keys: list[Key], least: int = LEAST_ROWS) -> Iterator[IntervalBin]:
    """A bin for each key whose code at least `least` rows have."""
    counts = np.bincount(codes, minlength=len(keys))
    ordered, starts = scores[np.lexsort((scores, codes))], np.cumsum(counts) - counts
    for (category, tier), count, start in zip(keys, counts.tolist(), starts.tolist(), strict=True):
        if count >= least:
            ranks = [-(-(count + 1) * level // 100) for level in LEVELS]  # ceil((n + 1) level)
            yield IntervalBin(category, tier, count, tuple(float(ordered[start + rank - 1]) for rank in ranks))


def _widths(intervals: Intervals) -> FloatArray:
    """[categories + 1, tiers, levels]: half the width in log price, before scaling, of the finest bin there is."""
    found = {(one.category, one.tier): one.widths for one in intervals.bins}
    tiers = range(len(intervals.tier_edges) + 1)

    def finest(name: str, tier: int) -> tuple[float, ...]:
        keys = ((name, tier), (name, None), (None, tier))
        return next((found[key] for key in keys if key in found), found[(None, None)])

    return np.array([[finest(name, tier) for tier in tiers] for name in (*intervals.categories, OTHERS)])


def _groups(intervals: Intervals, rows: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """What is grouped by, the group, and [n] bool: its rows."""
    yield "overall", "all rows", np.ones(len(rows), bool)
    by = [("tier of predicted price", tier_names(intervals), _tiers(intervals, rows))]
    if intervals.categories:
        by.append((intervals.by, [*intervals.categories, "others"], _category_codes(intervals, rows)))
    for name, groups, codes in by:
        found = ((group, codes == code) for code, group in enumerate(groups))
        yield from ((name, group, chosen) for group, chosen in found if chosen.any())
