"""The section about groups: SMAPE by price bin, by category and by the columns that the evaluation grouped by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.records.intervals import CATEGORY
from fusion.records.price_bins import BIN_NAMES, OUTSIDE, price_bins
from fusion.report import charts
from fusion.report.blocks import (
    Chart,
    Section,
    Table,
    between,
    count,
    counted,
    dollars,
    number,
    percent,
    shortened,
)
from fusion.report.charts import Dot
from fusion.report.gather import Validated

# Fewest rows of a group that is named as the worst. The SMAPE of a row is about 40 with as large a deviation, so the
# mean over 30 rows has a standard error of about 7; of smaller groups, the worst is mostly the unluckiest.
LEAST_NAMED = 30
LEAST_SHOWN = 10  # rows of a group in a chart: the interval of a smaller one would be wider than the chart
MOST_GROUPS = 16  # groups in a chart; more do not fit on a screen. The table has them all
MOST_LISTED = 100  # groups in a table, the largest; nobody reads more, and the page stays small
MOST_COLUMNS = 8  # tables of columns that the evaluation grouped by
MISSING = "(missing)"


@dataclass(frozen=True)
class Group:
    name: str
    rows: int
    smape: Estimate
    ratio: float  # median of predicted / true price


def groups_of(rows: pd.DataFrame, labels: pd.Series) -> list[Group]:
    """The SMAPE of each of the `MOST_LISTED` largest groups, with an interval from groups of near-duplicates."""
    names = labels.to_numpy()
    largest = set(pd.Series(names).value_counts().index[:MOST_LISTED])
    columns = rows[["price", "predicted", "smape", "group"]]
    return [_group(str(name), part) for name, part in columns.groupby(names, sort=False) if name in largest]


def _group(name: str, part: pd.DataFrame) -> Group:
    smape = clustered_mean(part["smape"].to_numpy(), part["group"].to_numpy())
    return Group(name, len(part), smape, float((part["predicted"] / part["price"]).median()))


def by_group(found: Validated) -> Section:
    """SMAPE by price bin, by category and by the columns that the evaluation grouped by."""
    prices = groups_of(found.rows, price_bins(found.rows["price"]))
    prices.sort(key=lambda group: [*BIN_NAMES, OUTSIDE].index(group.name))
    named = [Group(dollar_bin(group.name), group.rows, group.smape, group.ratio) for group in prices]
    every = [("price", "true price, dollars", named)]
    if "category" in found.rows and found.rows["category"].nunique() > 1:
        column = _category_column(found)
        labels = found.rows["category"].astype("str").where(lambda text: text != "", MISSING)
        of_category = sorted(groups_of(found.rows, labels), key=lambda group: -group.rows)
        every.append((column, f"column {column}", of_category))
    lead = [_worst(which, groups, found.smape.mean) for which, _, groups in every]
    plots = [_groups_chart(f"groups-{i}", which, what, groups, found) for i, (which, what, groups) in enumerate(every)]
    files = found.rows_files
    return Section("groups", "Where it is right and wrong", [text for text in lead if text], files, plots,
                   hidden=_evaluated_groups(found))  # fmt: skip


def _category_column(found: Validated) -> str:
    """Name of the column of `train.csv` that "category" of the rows was read from."""
    return found.intervals.by if found.intervals and found.intervals.by else CATEGORY


def dollar_bin(name: str) -> str:
    return f"${name.replace('-', '–')}" if name != OUTSIDE else name


def _worst(which: str, groups: Sequence[Group], overall: float) -> str:
    large = [group for group in groups if group.rows >= LEAST_NAMED]
    if not large:
        return f"No group by {which} has {LEAST_NAMED} rows or more, so none is named as the worst."
    worst, best = (choose(large, key=lambda group: group.smape.mean) for choose in (max, min))
    if len(large) == 1:
        return f"By {which}, only {shortened(worst.name, 40)} has {LEAST_NAMED} rows or more."
    times = worst.smape.mean / overall if overall else float("nan")
    among = f"of the {MOST_LISTED} largest groups" if len(groups) == MOST_LISTED else "group"
    return (
        f"By {which}, the worst {among} of at least {LEAST_NAMED} rows is {shortened(worst.name, 40)}, with a SMAPE of "
        f"{percent(worst.smape.mean)} ({between(*_possible(worst.smape))}), {number(times, 1)} times that of "
        f"all rows; the best is {shortened(best.name, 40)}, with {percent(best.smape.mean)}."
    )


def _groups_chart(name: str, which: str, what: str, groups: Sequence[Group], found: Validated) -> Chart:
    large = [group for group in groups if group.rows >= LEAST_SHOWN]
    shown = (large or list(groups))[:MOST_GROUPS]
    lines = [Dot(g.name, g.smape.mean, *_possible(g.smape), counted(g.rows, "row")) for g in shown]
    left = len(groups) - len(shown)
    note = f"{len(shown)} of {len(groups)} groups; the table has the others, which are smaller." if left else ""
    alt = f"SMAPE by {what}: " + "; ".join(f"{line.label} {percent(line.value)}" for line in lines)
    table = Table(
        f"SMAPE by {what}",
        (which, "rows", "SMAPE, %", "95% interval", "median predicted / true"),
        [
            (shortened(g.name, 80), count(g.rows), number(g.smape.mean), between(*_possible(g.smape)),
             f"{number(g.ratio)}×")
            for g in groups
        ],
        frozenset({1, 2, 3, 4}),
    )  # fmt: skip
    overall = found.smape.mean
    svg = charts.dots(name, alt, lines, "SMAPE, %", reference=overall, marked=f"all rows: {number(overall, 1)}%")
    return Chart(f"By {which}", f"SMAPE by {what}, with 95% intervals", svg, table, note)


def _possible(smape: Estimate) -> tuple[float | None, float | None]:
    """The interval of a SMAPE, without the values below 0% and above 200% that no SMAPE can have."""
    if smape.low is None or smape.high is None:
        return None, None
    return max(0.0, smape.low), min(200.0, smape.high)


def _evaluated_groups(found: Validated) -> list[Table]:
    """Groups that only the evaluation knows: which sources a row has, and columns of the user."""
    if found.evaluated is None:
        return []
    groups, shown = found.evaluated.groups, {"overall", "price_bin", "price_range", _category_column(found)}
    others = [name for name in dict.fromkeys(groups["by"]) if name not in shown]
    tables = ((str(name), groups[groups["by"] == name].head(MOST_LISTED)) for name in others[:MOST_COLUMNS])
    return [_evaluated_table(name, rows) for name, rows in tables]


def _evaluated_table(name: str, groups: pd.DataFrame) -> Table:
    rows = [
        (shortened(str(one["group"]), 80), count(one["count"]), number(one["smape"]),
         between(one["smape_low"], one["smape_high"]), dollars(one["mae"]), dollars(one["bias"]))
        for _, one in groups.iterrows()
    ]  # fmt: skip
    what = "which sources a row has" if name == "present" else f"column {shortened(name, 40)}"
    headings = (shortened(name, 40), "rows", "SMAPE, %", "95% interval", "mean error", "bias")
    return Table(f"By {what}, from metrics/groups.parquet", headings, rows, frozenset({1, 2, 3, 4, 5}))
