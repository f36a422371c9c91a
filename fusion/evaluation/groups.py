"""Metrics of predicted rows by group: by price, by which embeddings are present, and by any column of the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from fusion import log
from fusion.compare.standard_errors import smape_interval
from fusion.metrics import group_metrics, row_smape
from fusion.records.intervals import LEVELS, is_within
from fusion.records.price_bins import BIN_NAMES, OUTSIDE, binned, price_bins
from fusion.records.schemas import Baselines

# Edges in dollars of the column `price_range`, which has fewer and larger groups.
RANGES = (0, 10, 30, 100, 300, np.inf)
RANGE_NAMES = ["very low", "low", "middle", "high", "very high"]
N_EXTREMES = 20  # worst rows, and best rows, that are listed: as many as a person looks through
# Groups of a --by column that are kept, the largest first. Nobody reads a table of more; a column of ids would give as
# many as there are rows. A warning says how many there are.
LARGEST_COLUMN = 200
MISSING = "missing"  # the group of rows whose value of a --by column is missing or blank


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        groups: one row per group: by, group, count, share, smape with its 95% interval, and the other metrics.
        worst, best: the `N_EXTREMES` rows with the largest and the smallest SMAPE.
        gates: mean gate weight of each expert by price bin; empty for models without a gate.
        distributions: quantiles of true prices, predicted prices and errors.
        as_trained: whether prices and embeddings are those of the training; None if that is not known.
        coverage: how often intervals contain the price, as of `fusion.records.intervals.coverage`; empty if there are
            no intervals.
        baselines: what the run has to beat on the same rows; None if that is not known.
    """

    groups: pd.DataFrame
    worst: pd.DataFrame
    best: pd.DataFrame
    gates: pd.DataFrame
    distributions: pd.DataFrame
    as_trained: bool | None = None
    coverage: pd.DataFrame = field(default_factory=pd.DataFrame)
    baselines: Baselines | None = None


def evaluate(
    rows: pd.DataFrame,
    by: pd.DataFrame,
    gate: np.ndarray | None = None,
    *,
    as_trained: bool | None = None,
    coverage: pd.DataFrame | None = None,
    duplicates: np.ndarray | None = None,
) -> Evaluation:
    """Computes metrics of predicted rows, overall and by group.

    Args:
        rows: columns sample_id, price, predicted, present (which roles the row has, in words), and optionally interval
            bounds such as low_90 and high_90.
        by: the user's columns to group by, for the same rows. They may have any name, even that of a computed column.
        gate: [n, E] weight of each expert; None for models without a gate.
        duplicates: [n] the group of near-duplicates of each row, for intervals; None: all rows are independent.
        as_trained, coverage: as in `Evaluation`.
    """
    rows = rows.assign(smape=row_smape(rows["price"], rows["predicted"]))
    worst, best = _extremes(rows)
    return Evaluation(
        grouped(rows, by, duplicates),
        worst,
        best,
        _gates(rows, gate),
        _distributions(rows),
        as_trained,
        pd.DataFrame() if coverage is None else coverage,
    )


def grouped(rows: pd.DataFrame, by: pd.DataFrame, duplicates: np.ndarray | None = None) -> pd.DataFrame:
    """Metrics of all rows and of each group, as `Evaluation.groups`.

    Args:
        rows, by, duplicates: as for `evaluate`; without the column present, rows are not grouped by it.
    """
    groups = np.arange(len(rows)) if duplicates is None else duplicates
    columns: dict[str, np.ndarray] = {"smape": row_smape(rows["price"], rows["predicted"]), "duplicates": groups}
    columns |= {name: rows[name].to_numpy(np.float64) for name in ("price", "predicted")}
    columns |= {f"covered_{level}": is_within(rows, level) for level in LEVELS if f"low_{level}" in rows}
    return pd.DataFrame([_metrics(columns, name, group, chosen) for name, group, chosen in _groups(rows, by)])


def _extremes(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the `N_EXTREMES` rows with the largest SMAPE, and those with the smallest; ties go by sample_id."""
    errors = rows["smape"].to_numpy(np.float64)
    known = np.sort(errors[~np.isnan(errors)])
    worst = best = rows
    if len(known) > N_EXTREMES:
        # Only candidates are sorted by both columns. Sorting all rows so would take ten times as long.
        worst, best = rows[~(errors < known[-N_EXTREMES])], rows[~(errors > known[N_EXTREMES - 1])]
    return _ordered(worst).head(N_EXTREMES), _ordered(best).tail(N_EXTREMES).iloc[::-1]


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values(["smape", "sample_id"], ascending=[False, True])


def _groups(rows: pd.DataFrame, by: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields, for each group, what rows are grouped by, the name of the group, and the positions of its rows."""
    yield "overall", "all rows", np.arange(len(rows))
    own = {
        "price_bin": (price_bins(rows["price"]), BIN_NAMES),
        "price_range": (binned(rows["price"], RANGES, RANGE_NAMES), RANGE_NAMES),
    }
    if "present" in rows:
        own["present"] = rows["present"], sorted(rows["present"].unique())
    for name, (labels, groups) in own.items():
        positions = _positions(labels)
        outside = [OUTSIDE] if OUTSIDE in positions else []
        for group in [*groups, *outside]:
            yield name, group, positions.get(group, np.arange(0))  # bins without rows are listed too
    for name in by.columns:
        positions = _positions(by[name])
        # Distinguishes a column of the user that is called, for example, "present".
        shown = f"{name} (column)" if name in ("overall", *own) else name
        for group in _largest(positions, shown):
            yield shown, group, positions[group]


def _positions(values: pd.Series) -> dict[str, np.ndarray]:
    """Returns the positions of the rows with each value. Values are texts; missing and blank ones are all `MISSING`."""
    codes, found = pd.factorize(values.astype("object"), use_na_sentinel=True)
    # A missing value has code -1, which selects the last label.
    labels = np.array([*(str(value) if str(value).strip() else MISSING for value in found), MISSING], dtype=object)
    merged, names = pd.factorize(labels)  # merges values that are the same text, such as 1 and "1"
    order = np.argsort(merged[codes], kind="stable")
    bounds = np.cumsum(np.bincount(merged[codes], minlength=len(names)))[:-1]
    parts = zip(names, np.split(order, bounds), strict=True)
    return {str(name): part for name, part in parts if len(part)}


def _largest(found: Mapping[str, np.ndarray], column: str) -> list[str]:
    """Returns the values with the most rows, at most `LARGEST_COLUMN`, and warns if there are more."""
    if len(found) > LARGEST_COLUMN:
        log.warning(event="by_truncated", column=column, values=len(found), shown=LARGEST_COLUMN)
    return sorted(found, key=lambda value: (-len(found[value]), value))[:LARGEST_COLUMN]


def _metrics(columns: Mapping[str, np.ndarray], name: str, group: str, rows: np.ndarray) -> dict[str, Any]:
    """Returns the row of `Evaluation.groups` for a group: its name, size, metrics and share of covered prices."""
    smape, price, predicted = (columns[column][rows] for column in ("smape", "price", "predicted"))
    low, high = smape_interval(smape, columns["duplicates"][rows]) or (float("nan"), float("nan"))
    head = {"by": name, "group": group, "count": len(rows), "share": len(rows) / len(columns["smape"])}
    metrics = group_metrics(price, predicted)
    covered = {}
    for column, values in columns.items():
        if column.startswith("covered_"):
            covered[column] = float(values[rows].mean()) if len(rows) else float("nan")
    return head | {"smape": metrics.pop("smape"), "smape_low": low, "smape_high": high} | metrics | covered


def _gates(rows: pd.DataFrame, gate: np.ndarray | None) -> pd.DataFrame:
    if gate is None:
        return pd.DataFrame()
    frame = pd.DataFrame(gate, columns=[f"expert_{e}" for e in range(gate.shape[1])])
    by_bin = frame.groupby(price_bins(rows["price"]).to_numpy()).mean()
    order = [name for name in [*BIN_NAMES, OUTSIDE] if name in by_bin.index]
    return pd.concat([frame.mean().to_frame("all rows").T, by_bin.loc[order]])


def _distributions(rows: pd.DataFrame) -> pd.DataFrame:
    quantiles = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]
    columns = rows.assign(error=rows["predicted"] - rows["price"])[["price", "predicted", "error", "smape"]]
    return columns.quantile(quantiles).rename_axis("quantile").reset_index()
