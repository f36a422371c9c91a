"""Prediction intervals: for each predicted price, bounds that contain the true price in 80, 90 or 95% of cases.

The method is split conformal prediction (Vovk et al., 2005; Lei et al., 2018) on the validation rows, which no training
step saw. The score of a row is `|log price - log predicted|`, so an interval divides and multiplies the predicted price
by one factor. If the model estimates its own uncertainty ("spread"), the score is divided by a scale that grows with
it, and the interval of a new row is multiplied by the scale of that row.

Rows are divided into bins, and each bin has its own intervals (Mondrian conformal prediction). With n rows in a bin,
the k-th smallest of their scores, `k = ceil((n + 1) level)`, covers a new row of that bin with a probability of at
least `level`, if the new row is exchangeable with them. A bin is a tier of the predicted price within a category. The
tiers of a category that have fewer than 100 rows share one bin, and so do all categories of fewer than 100 rows.
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
# Fewest rows of a bin, of a tier and of a bin of the spread. With 100 rows, the coverage of a 90% interval is off by
# chance by 3 points (one standard error); with fewer rows it would be off by more.
LEAST_ROWS = 100
# Fewest rows for intervals at all. With n scores the largest one covers n / (n + 1) of new rows, so that 95% needs at
# least 19; below this number there are no intervals.
FEWEST_ROWS = 20
N_TIERS = 5  # of the predicted price, fewer if they would have less than `LEAST_ROWS` rows
N_SPREADS = 10  # bins of the spread, each with a scale of its own; fewer as for tiers
MAX_CATEGORIES = 200  # the largest categories get bins of their own; this limits the size of intervals.json
CATEGORY = "category"  # the default of --interval-by
OTHERS = ""  # stands for all categories without bins of their own, and for a missing category
# Parts of the cross-fitting in `crossed`, which fits on all but one of them. With two parts, the intervals would be
# fitted on half of the rows, where bins of 100 to 200 rows fall below `LEAST_ROWS` and are merged with others; the
# reported coverage would be that of bins that the final intervals do not have.
N_PARTS = 10
# The scale of a bin of the spread is this quantile of its errors. It only has to grow with the errors: the widths are
# fitted after the scaling, so the coverage does not depend on it.
SCALE_LEVEL = 0.9
# Smallest scale, as a share of the scale of all rows. Rows whose spread is 0 may all have an error of 0, and a score is
# divided by the scale.
SMALLEST_SCALE = 0.05
LARGEST_LOG = 700.0  # half widths in log price are cut off here, since exp of more than 709 overflows float64

FloatArray = np.ndarray
Key = tuple[str | None, int | None]  # category and tier of a bin, as in `IntervalBin`: None stands for all


def fit(rows: pd.DataFrame, by: str = "") -> Intervals | None:
    """Fits intervals to rows that were not trained on; None if there are fewer than `FEWEST_ROWS`.

    Args:
        rows: columns price and predicted, in dollars; optional columns spread (any number that grows with the expected
            error) and category (text).
        by: name of the column of the table that category was read from; it is only stored.
    """
    if len(rows) < FEWEST_ROWS:
        return None
    edges = _edges(rows["predicted"], min(N_TIERS, len(rows) // LEAST_ROWS))
    made = Intervals(SCHEMA, LEVELS, len(rows), by, (), tuple(edges), (), (), ())
    made = replace(made, categories=_categories(rows)) if "category" in rows else made
    made = _scaled(made, rows) if "spread" in rows else made
    return replace(made, bins=tuple(_bins(made, rows)))


def bounds(intervals: Intervals, rows: pd.DataFrame) -> dict[str, FloatArray]:
    """Bounds of each row: low_80, high_80, low_90, …, each [n] dollars.

    Always `low_95 <= low_90 <= low_80 <= predicted <= high_80 <= high_90 <= high_95`, and all bounds are finite.

    Args:
        rows: columns as for `fit`, without price. A category that is missing or new uses the bins of the others.
    """
    widths = _widths(intervals)[_category_codes(intervals, rows), _tiers(intervals, rows)]  # [n, levels]
    logs = np.minimum(widths * _scales(intervals, rows)[:, None], LARGEST_LOG)
    predicted, limits, found = rows["predicted"].to_numpy(np.float64), np.finfo(np.float64), dict[str, FloatArray]()
    with np.errstate(over="ignore", under="ignore"):
        for column, level in enumerate(intervals.levels):
            factor = np.exp(logs[:, column])
            found[f"low_{level}"] = np.minimum(np.maximum(predicted / factor, limits.tiny), predicted)
            found[f"high_{level}"] = np.maximum(np.minimum(predicted * factor, limits.max), predicted)
    return found


def crossed(rows: pd.DataFrame, groups: np.ndarray, by: str = "") -> dict[str, FloatArray] | None:
    """As `bounds`, by cross-fitting: the bounds of a row come from intervals fitted without it and its group.

    An evaluation needs this, because it measures the coverage on the rows that the final intervals are fitted to.
    Returns None if there are too few rows to fit.

    Args:
        rows: columns as for `fit`.
        groups: [n] number of the group of near-duplicates of each row, as in `split.parquet`.
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
    """Share of prices that lie within their bounds: of all rows, per tier of the predicted price and per category.

    Args:
        rows: columns as for `fit`, and the bounds.

    Returns:
        One row per group: by, group, count, covered_80, …, factor_90, and error, the standard error that covered_90
        has by chance if the true coverage is 90%.
    """
    levels = [level for level in intervals.levels if f"low_{level}" in rows]
    covered = {f"covered_{level}": is_within(rows, level) for level in levels}
    found = []
    for name, group, chosen in _groups(intervals, rows):
        shares = {column: float(values[chosen].mean()) for column, values in covered.items()}
        error = np.sqrt(0.9 * 0.1 / chosen.sum())  # of a binomial share with p = 0.9
        factor = median_factor(rows[chosen])
        found.append({"by": name, "group": group, "count": int(chosen.sum()), **shares, "error": error} | factor)
    return pd.DataFrame(found)


def is_within(rows: pd.DataFrame, level: int) -> np.ndarray:
    """[n] bool: the price lies between the row's bounds."""
    return rows["price"].between(rows[f"low_{level}"], rows[f"high_{level}"]).to_numpy(bool)


def misplaced(rows: pd.DataFrame, price: str) -> int:
    """Number of rows whose bounds are not finite and positive, or not in their order around the price.

    Args:
        rows: with both bounds of each of its levels, and at least one level.
        price: name of the column that the bounds must surround.
    """
    levels = sorted(int(str(name).removeprefix("low_")) for name in rows if str(name).startswith("low_"))
    names = [*(f"low_{level}" for level in reversed(levels)), price, *(f"high_{level}" for level in levels)]
    values = rows[names].to_numpy(np.float64)
    is_right = np.isfinite(values).all(axis=1)
    is_right &= (values > 0).all(axis=1)
    is_right &= (np.diff(values, axis=1) >= 0).all(axis=1)
    return int((~is_right).sum())


def median_factor(rows: pd.DataFrame, level: int = 90) -> dict[str, float]:
    """{"factor_90": m}: the median, over the rows, of the factor between the upper bound and the predicted price."""
    factors = rows[f"high_{level}"].to_numpy() / rows["predicted"].to_numpy()
    return {f"factor_{level}": float(np.median(factors)) if len(factors) else float("nan")}


def intervals_of(checkpoint: Checkpoint) -> Intervals | None:
    """The intervals of a checkpoint, verified.

    Returns None if it has no intervals: an earlier version wrote it, or it had too few validation rows.
    """
    if not checkpoint.manifest.sha256_of(INTERVALS):
        return None
    return parse(Intervals, read_file(checkpoint, INTERVALS), f"{checkpoint.url}/{INTERVALS}")


def category_column(config: RunConfig) -> str:
    """Name of the column whose values have intervals of their own: --interval-by, by default "category"."""
    return config.interval_by or CATEGORY


def category_of(table: Table, column: str, rows: np.ndarray | slice = slice(None)) -> pd.Series | None:
    """Values of a column as text, for these rows of the table; empty text where a value is missing.

    Returns None if the table has no such column.
    """
    if not column or column not in table.frame:
        return None
    return table.frame[column].iloc[rows].astype("str").fillna(OTHERS).str.strip()


def tier_names(intervals: Intervals) -> list[str]:
    """The tiers in words, such as "below $9.99" and "$9.99 to $20.00"."""
    # Prices below a cent get two significant digits, since two decimals would show 0.00.
    edges = [f"${edge:,.2f}" if edge >= 0.01 else f"${edge:.2g}" for edge in intervals.tier_edges]
    if not edges:
        return ["any price"]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    return [f"below {edges[0]}", *between, f"from {edges[-1]}"]


def _edges(values: pd.Series, n_bins: int) -> FloatArray:
    """Ascending lower edges of all bins but the first, for `n_bins` bins with equally many values.

    There are fewer edges where many values are equal.
    """
    known = values.to_numpy(np.float64)
    if n_bins < 2:
        return known[:0]
    edges = np.unique(np.quantile(known, np.arange(1, n_bins) / n_bins, method="higher"))
    found: FloatArray = edges[(edges > known.min()) & np.isfinite(edges)]
    return found


def _categories(rows: pd.DataFrame) -> tuple[str, ...]:
    """The categories that get bins of their own, sorted."""
    counts = rows["category"].value_counts()
    large = counts[(counts >= LEAST_ROWS) & (counts.index != OTHERS)].head(MAX_CATEGORIES)
    return tuple(sorted(map(str, large.index)))


def _errors(rows: pd.DataFrame) -> FloatArray:
    """[n] `|log price - log predicted|`."""
    price, predicted = (rows[name].to_numpy(np.float64) for name in ("price", "predicted"))
    errors: FloatArray = np.abs(np.log(price) - np.log(predicted))
    return errors


def _scaled(made: Intervals, rows: pd.DataFrame) -> Intervals:
    """The intervals with a scale for each bin of the spread: a high quantile of the errors in the bin.

    Scales never fall from a bin to the next, so that a larger spread never gives a narrower interval.
    """
    spread, errors = rows["spread"].fillna(np.inf), _errors(rows)
    edges = _edges(spread, min(N_SPREADS, len(rows) // LEAST_ROWS))
    smallest = SMALLEST_SCALE * float(np.quantile(errors, SCALE_LEVEL))
    if smallest == 0:  # most errors are 0, so there is nothing to scale by
        return made
    codes = np.searchsorted(edges, spread, side="right")
    scales = [max(smallest, float(np.quantile(errors[codes == code], SCALE_LEVEL))) for code in range(len(edges) + 1)]
    return replace(made, spread_edges=tuple(edges), scales=tuple(np.maximum.accumulate(scales)))


def _scales(intervals: Intervals, rows: pd.DataFrame) -> FloatArray:
    """[n] factor by which the widths of each row are multiplied."""
    if not intervals.scales:
        return np.ones(len(rows))
    # A spread of NaN sorts into the last bin, which has the largest scale.
    codes = np.searchsorted(np.asarray(intervals.spread_edges), rows["spread"], side="right")
    return np.asarray(intervals.scales)[codes]


def _tiers(intervals: Intervals, rows: pd.DataFrame) -> np.ndarray:
    """[n] index of the tier of the predicted price, from 0."""
    return np.searchsorted(np.asarray(intervals.tier_edges), rows["predicted"], side="right")


def _category_codes(intervals: Intervals, rows: pd.DataFrame) -> np.ndarray:
    """[n] index of the row's category in `intervals.categories`; `len(intervals.categories)` for all others."""
    others = len(intervals.categories)
    if "category" not in rows:
        return np.full(len(rows), others)
    codes = {category: code for code, category in enumerate(intervals.categories)}
    return rows["category"].map(codes).fillna(others).to_numpy(np.int64)


def _bins(made: Intervals, rows: pd.DataFrame) -> Iterator[IntervalBin]:
    """The bins: one of all rows, one per tier, and those of each category.

    Within a category, each tier with enough rows is a bin. The other tiers of the category share one bin, which the
    smallest of the former tiers join until it has enough rows too. A bin of too few rows is left out; its rows use a
    coarser one, see `_widths`.
    """
    scores, tiers = _errors(rows) / _scales(made, rows), _tiers(made, rows)
    yield from _enough(scores, np.zeros(len(rows), np.int64), [(None, None)], least=0)
    n_tiers = len(made.tier_edges) + 1
    yield from _enough(scores, tiers, [(None, tier) for tier in range(n_tiers)])
    if not made.categories:
        return
    names, categories = [*made.categories, OTHERS], _category_codes(made, rows)
    cells = categories * n_tiers + tiers
    counts = np.bincount(cells, minlength=len(names) * n_tiers).reshape(len(names), n_tiers)
    chosen = _has_own_bin(counts).reshape(-1)[cells]
    keys: list[Key] = [(name, tier) for name in names for tier in range(n_tiers)]
    yield from _enough(scores[~chosen], categories[~chosen], [(name, None) for name in names])
    yield from _enough(scores[chosen], cells[chosen], keys)


def _has_own_bin(counts: np.ndarray) -> np.ndarray:
    """[categories, tiers] bool: whether a tier of a category, with this many rows, is a bin by itself."""
    own: np.ndarray = counts >= LEAST_ROWS
    for row, is_own in zip(counts, own, strict=True):
        for tier in np.argsort(row, kind="stable"):  # smallest first
            if 0 < row[~is_own].sum() < LEAST_ROWS:
                is_own[tier] = False
    return own


def _enough(scores: FloatArray, codes: np.ndarray, keys: list[Key], least: int = LEAST_ROWS) -> Iterator[IntervalBin]:
    """A bin for each key with at least `least` rows.

    Args:
        scores: [n] scaled errors.
        codes: [n] index of each row's key in `keys`.
    """
    counts = np.bincount(codes, minlength=len(keys))
    ordered, starts = scores[np.lexsort((scores, codes))], np.cumsum(counts) - counts
    for (category, tier), count, start in zip(keys, counts.tolist(), starts.tolist(), strict=True):
        if count >= least:
            ranks = [-(-(count + 1) * level // 100) for level in LEVELS]  # ceil((n + 1) level)
            yield IntervalBin(category, tier, count, tuple(float(ordered[start + rank - 1]) for rank in ranks))


def _widths(intervals: Intervals) -> FloatArray:
    """[categories + 1, tiers, levels]: half the width in log price, before scaling.

    It is that of the finest bin that exists: of the category and tier, of the category, of the tier, or of all rows.

    Raises:
        KeyError: there is no bin of all rows, as in a damaged document.
    """
    found = {(one.category, one.tier): one.widths for one in intervals.bins}
    of_all_rows = found[(None, None)]  # must exist, even if each category and tier has a finer bin
    tiers = range(len(intervals.tier_edges) + 1)

    def finest(name: str, tier: int) -> tuple[float, ...]:
        for key in ((name, tier), (name, None), (None, tier)):
            if key in found:
                return found[key]
        return of_all_rows

    return np.array([[finest(name, tier) for tier in tiers] for name in (*intervals.categories, OTHERS)])


def _groups(intervals: Intervals, rows: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """The groups that coverage is reported for: what is grouped by, name of the group, and [n] bool: its rows."""
    yield "overall", "all rows", np.ones(len(rows), bool)
    by = [("tier of predicted price", tier_names(intervals), _tiers(intervals, rows))]
    if intervals.categories:
        by.append((intervals.by, [*intervals.categories, "others"], _category_codes(intervals, rows)))
    for name, groups, codes in by:
        for code, group in enumerate(groups):
            chosen = codes == code
            if chosen.any():
                yield name, group, chosen
