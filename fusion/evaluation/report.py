"""Prints an evaluation on a terminal.

Values of the user's columns cannot control the terminal: they are printed without markup, and their control characters
are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import pandas as pd

from fusion.command import terminal
from fusion.errors import visible
from fusion.metrics import readable

# Widths are in characters.
TEXT_WIDTH = 40  # of a text such as a title, which is cut off there
N_TEXTS = 2  # the user's columns that are shown with extreme rows: more do not fit beside the numbers
LEAST_TEXT = 8  # if a text would get less than this, it would be unreadable, and its column is left out
BETWEEN = 2  # gap between two columns of a table; there is one more character left of the first
WHOLE = ("sample_id", "bin")  # texts that name a row, and so are never cut off
PLAIN_WIDTH = 150  # if standard output is not a terminal: all columns fit

# Metric to its heading. A narrow terminal shows only the first ones; groups.csv contains all.
HEADINGS = {
    "count": "rows",
    "share": "share",
    "smape": "SMAPE",
    "interval": "95% interval",
    "mae": "MAE",
    "mean_true": "true",
    "mean_pred": "pred",
    "bias": "bias",
    "median_error": "median err",
    "mape": "MAPE",
    "r2": "R2",
    "rmse": "RMSE",
}


def show(
    groups: pd.DataFrame,
    worst: pd.DataFrame,
    best: pd.DataFrame,
    gates: pd.DataFrame,
    distributions: pd.DataFrame,
    note: str = "",
    coverage: pd.DataFrame | None = None,
) -> None:
    """Prints metrics by group, coverage, extreme rows, distributions and gate weights on standard output.

    Args:
        groups, gates, distributions: as in `Evaluation`.
        worst, best: as in `Evaluation`, with columns of the user to show.
        note: a remark about the rows, for the title.
        coverage: as of `fusion.records.intervals.coverage`; None or empty if there are no intervals.
    """
    console = terminal.console(PLAIN_WIDTH)
    console.print(_groups(groups, console.width, note))
    if coverage is not None and not coverage.empty:
        console.print(_coverage(coverage))
    for title, rows in (("Worst rows, by SMAPE", worst), ("Best rows, by SMAPE", best)):
        numbers = ["sample_id", "price", "predicted", "smape"]
        texts = [column for column in rows.columns if column not in (*numbers, "present")][:N_TEXTS]
        console.print(_plain(title, rows[numbers + texts], console.width))
    title = "Quantiles of price, prediction and error in $, and of a row's SMAPE in %"
    console.print(_plain(title, distributions, console.width))
    if not gates.empty:
        title = "Share of the gate by expert and price bin"
        console.print(_plain(title, gates.rename_axis("bin").reset_index(), console.width))


def _groups(groups: pd.DataFrame, width: int, note: str) -> terminal.Table:
    """Returns the table of metrics, with a section per column that rows are grouped by."""
    shown = list(HEADINGS)[: _n_metrics(width)]

    def cells(row: dict[Hashable, Any]) -> list[str]:
        row["interval"] = f"{_number(row['smape_low'])} - {_number(row['smape_high'])}"
        row["share"] = f"{row['share']:.1%}"
        return [_number(row[name]) for name in shown]

    title = f"Validation rows{note}. SMAPE and MAPE in %, R2 a number, the rest in $"
    return _by_group(title, groups, [HEADINGS[name] for name in shown], cells)


def _n_metrics(width: int) -> int:
    """Returns how many metrics to show on a terminal of this width."""
    if width < 90:
        return 5
    return 9 if width < 125 else len(HEADINGS)


def _coverage(coverage: pd.DataFrame) -> terminal.Table:
    """Returns the table of coverage, with the standard error of the share within 90% bounds if that share is 90%."""
    covered = [str(name) for name in coverage if str(name).startswith("covered_")]
    shares = [f"{name.removeprefix('covered_')}%" for name in covered]

    def cells(row: dict[Hashable, Any]) -> list[str]:
        percents = [f"{row[name]:.1%}" for name in (*covered, "error")]
        return [str(row["count"]), *percents, readable(row["factor_90"])]

    title = "Intervals: share of the true prices inside, and the factor from the price to a bound of 90%"
    return _by_group(title, coverage, ["rows", *shares, "s.e. of 90%", "factor"], cells)


def _by_group(
    title: str, frame: pd.DataFrame, headings: list[str], cells: Callable[[dict[Hashable, Any]], list[str]]
) -> terminal.Table:
    """Returns a table of the groups, with a section per column that rows are grouped by; `cells` formats a row."""
    table = terminal.table(title, "group", *headings, numbers=headings, max_width={"group": TEXT_WIDTH})
    for by, part in frame.groupby("by", sort=False):
        if by != "overall":
            table.add_section()
            terminal.add(table, f"by {by}", style="bold")
        for row in part.to_dict("records"):
            terminal.add(table, str(row["group"]), *cells(row))
    return table


def _plain(title: str, frame: pd.DataFrame, width: int) -> terminal.Table:
    """Returns a table in which numbers and ids are never cut off.

    Texts share the width that is left, and are left out if it is too small to read them.
    """
    frame = frame.rename(columns=str)
    cells = {column: [_number(cell) for cell in frame[column]] for column in frame.columns}
    texts = [column for column in cells if column not in WHOLE and not pd.api.types.is_numeric_dtype(frame[column])]
    taken = sum(BETWEEN + max(map(len, [column, *cells[column]])) for column in cells if column not in texts)
    text_width = min(TEXT_WIDTH, (width - 1 - taken) // max(1, len(texts)) - BETWEEN)
    if text_width < LEAST_TEXT:
        cells = {column: values for column, values in cells.items() if column not in texts}
    numbers = [column for column in cells if pd.api.types.is_numeric_dtype(frame[column])]
    table = terminal.table(title, *cells, numbers=numbers, max_width=dict.fromkeys(texts, text_width))
    for row in zip(*cells.values(), strict=True):
        terminal.add(table, *row)
    return table


def _number(cell: object) -> str:
    """Formats a float readably, NaN as "-", and any other value as text on one line without control characters."""
    if not isinstance(cell, float):
        return visible(" ".join(str(cell).split()))
    if math.isnan(cell):
        return "-"
    return readable(cell)
