"""What an evaluation looks like on a terminal.

Values of the user's columns are shown, never obeyed: markup is off, and control characters are written out.
"""

from __future__ import annotations

import math
import sys

import pandas as pd
from rich.console import Console
from rich.table import Table

from fusion.command import terminal
from fusion.errors import visible
from fusion.metrics import readable

TEXT_WIDTH = 40
N_TEXTS = 2  # columns of the user's that extreme rows are shown with
LEAST_TEXT = 8  # columns below which a text says nothing
BETWEEN = 2  # columns that a table has between two of its own; one more is left of the first
WHOLE = ("sample_id", "bin")  # texts that name a row
PLAIN_WIDTH = 150  # columns where standard output is no terminal

# Metric to its heading; a narrow terminal leaves out the last ones. Everything is in groups.csv.
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
    """Prints metrics by group, the extreme rows, the distributions and the gate's use on standard output.

    Args:
        note: what has to be known of the rows.
        coverage: as of `fusion.records.intervals.coverage`; empty or None: there are no intervals.
    """
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
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


def _groups(groups: pd.DataFrame, width: int, note: str) -> Table:
    shown = list(HEADINGS)[: 5 if width < 90 else 9 if width < 125 else None]
    table = terminal.table(f"Validation rows{note}. SMAPE and MAPE in %, R2 a number, the rest in $")
    table.add_column("group", no_wrap=True, max_width=TEXT_WIDTH)
    for name in shown:
        table.add_column(HEADINGS[name], justify="right", no_wrap=True)
    for by, part in groups.groupby("by", sort=False):
        if by != "overall":
            table.add_section()
            terminal.add(table, f"by {by}", style="bold")
        for row in part.to_dict("records"):
            row["interval"] = f"{_number(row['smape_low'])} - {_number(row['smape_high'])}"
            row["share"] = f"{row['share']:.1%}"
            terminal.add(table, str(row["group"]), *(_number(row[name]) for name in shown))
    return table


def _coverage(coverage: pd.DataFrame) -> Table:
    covered = [str(name) for name in coverage if str(name).startswith("covered_")]
    table = terminal.table(
        "Intervals: share of the true prices inside, and the factor from the price to a bound of 90%"
    )
    table.add_column("group", no_wrap=True, max_width=TEXT_WIDTH)
    shares = [f"{name.removeprefix('covered_')}%" for name in covered]
    for heading in ("rows", *shares, "s.e. of 90%", "factor"):
        table.add_column(heading, justify="right", no_wrap=True)
    for by, part in coverage.groupby("by", sort=False):
        if by != "overall":
            table.add_section()
            terminal.add(table, f"by {by}", style="bold")
        for row in part.to_dict("records"):
            percents = [f"{row[name]:.1%}" for name in (*covered, "error")]
            terminal.add(table, str(row["group"]), str(row["count"]), *percents, readable(row["factor_90"]))
    return table


def _plain(title: str, frame: pd.DataFrame, width: int) -> Table:
    """Numbers and ids whole, whatever the terminal's width; texts get what is left, or go."""
    cells = {column: [_number(cell) for cell in frame[column]] for column in frame.columns}
    texts = [column for column in cells if column not in WHOLE and not pd.api.types.is_numeric_dtype(frame[column])]
    taken = sum(BETWEEN + max(map(len, [str(column), *cells[column]])) for column in cells if column not in texts)
    share = min(TEXT_WIDTH, (width - 1 - taken) // max(1, len(texts)) - BETWEEN)
    if share < LEAST_TEXT:
        cells = {column: values for column, values in cells.items() if column not in texts}
    table = terminal.table(title)
    for column in cells:
        number = pd.api.types.is_numeric_dtype(frame[column])
        largest = share if column in texts else None
        table.add_column(
            terminal.text(str(column)), justify="right" if number else "left", no_wrap=True, max_width=largest
        )
    for row in zip(*cells.values(), strict=True):
        terminal.add(table, *row)
    return table


def _number(cell: object) -> str:
    """A float with two decimals, with none where it is large; everything else as text on one line."""
    if not isinstance(cell, float):
        return visible(" ".join(str(cell).split()))
    if math.isnan(cell):
        return "-"
    return readable(cell)
