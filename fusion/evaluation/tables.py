"""Prints an evaluation on a terminal.

Values of the user's columns cannot control the terminal: they are printed without markup, and their control characters
are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pandas as pd
from rich.console import Console

from fusion.evaluation.groups import Evaluation
from fusion.metrics import readable
from fusion.records.baselines import in_words
from fusion.records.schemas import Baselines, BaselineScore
from fusion.terminal import tables
from fusion.terminal.escapes import visible

# Widths are in characters.
TEXT_WIDTH = 40  # of a text such as a title, which is cut off there
N_TEXTS = 2  # the user's columns that are shown with extreme rows: more do not fit beside the numbers
LEAST_TEXT = 8  # if a text would get less than this, it would be unreadable, and its column is left out
BETWEEN = 2  # gap between two columns of a table; there is one more character left of the first
WHOLE = ("sample_id", "bin")  # texts that name a row, and so are never cut off
PLAIN_WIDTH = 150  # if standard output is not a terminal: all columns fit
SHORT_WIDTH = 100  # the same for the short report
SHORT = ("count", "share", "smape", "interval", "mae", "median_error")  # its metrics: all fit into 80 columns
N_SHORT_GROUPS = 10  # groups of a column in the short report, the largest first: it should fit on a screen
N_SHORT_WORST = 3

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


def show(evaluation: Evaluation, note: str = "", written: str = "", everything: bool = True) -> None:
    """Prints an evaluation on standard output: tables, and at the end the headline again.

    Args:
        evaluation: its `worst` and `best` may have further columns, which are shown.
        note: a remark about the rows, for the title.
        written: the folder with the metrics, which is named at the end; empty: none is.
        everything: whether to print all tables and all metrics. Otherwise only those that a person asks for first.
    """
    console = tables.console(PLAIN_WIDTH if everything else SHORT_WIDTH)
    if everything:
        _show_all(console, evaluation, note)
    else:
        console.print(_groups(_first_groups(evaluation.groups), console.width, note, SHORT, evaluation.baselines))
        console.print(_rows("Worst rows, by SMAPE", evaluation.worst.head(N_SHORT_WORST), console.width))
    for line in headline(evaluation):
        console.print(tables.text(line, "bold"))
    if written:
        more = "" if everything else "; --all prints all tables and metrics"
        console.print(tables.text(f"written: {written}{more}"), soft_wrap=True)


def _show_all(console: Console, evaluation: Evaluation, note: str) -> None:
    shown = list(HEADINGS)[: _n_metrics(console.width)]
    console.print(_groups(evaluation.groups, console.width, note, shown, evaluation.baselines))
    if not evaluation.coverage.empty:
        console.print(_coverage(evaluation.coverage))
    console.print(_rows("Worst rows, by SMAPE", evaluation.worst, console.width))
    console.print(_rows("Best rows, by SMAPE", evaluation.best, console.width))
    title = "Quantiles of price, prediction and error in $, and of a row's SMAPE in %"
    console.print(_plain(title, evaluation.distributions, console.width))
    if not evaluation.gates.empty:
        title = "Share of the gate by expert and price bin"
        console.print(_plain(title, evaluation.gates.rename_axis("bin").reset_index(), console.width))


def headline(evaluation: Evaluation) -> list[str]:
    """The result in sentences: the score beside what it has to beat, the usual error, and how often intervals hold."""
    overall = evaluation.groups.iloc[0]
    interval = f"95% interval {_interval(overall['smape_low'], overall['smape_high'])}"
    lines = [f"SMAPE {_number(overall['smape'])}% on {overall['count']:,} validation rows ({interval})"]
    if evaluation.baselines is not None:
        lines += in_words(float(overall["smape"]), evaluation.baselines)
    errors = f"Half of the predicted prices are within ${_number(overall['median_error'])} of the true price"
    if "covered_90" in overall and not math.isnan(overall["covered_90"]):
        errors += f"; 90% intervals contain {overall['covered_90']:.1%} of the true prices"
    return [*lines, errors]


def _first_groups(groups: pd.DataFrame) -> pd.DataFrame:
    """The groups of the short report: overall, price bins, presence if it differs, and the largest of columns."""
    parts = []
    for by, part in groups.groupby("by", sort=False):
        is_of_no_use = by == "price_range" or (by == "present" and len(part) == 1)
        if not is_of_no_use:
            parts.append(part[part["count"] > 0].head(N_SHORT_GROUPS))
    return pd.concat(parts)


def _rows(title: str, rows: pd.DataFrame, width: int) -> tables.Table:
    numbers = ["sample_id", "price", "predicted", "smape"]
    texts = [column for column in rows.columns if column not in (*numbers, "present")][:N_TEXTS]
    return _plain(title, rows[numbers + texts], width)


def _groups(
    groups: pd.DataFrame, width: int, note: str, shown: Sequence[str] = (), baselines: Baselines | None = None
) -> tables.Table:
    """Returns the table of metrics, with a section per column that rows are grouped by.

    Args:
        shown: the metrics to show; by default as many as fit.
        baselines: what the run has to beat, for the rows above all others.
    """
    shown = shown or list(HEADINGS)[: _n_metrics(width)]

    def cells(row: dict[Hashable, Any]) -> list[str]:
        row["interval"] = _interval(row["smape_low"], row["smape_high"])
        row["share"] = f"{row['share']:.1%}"
        return [_number(row[name]) for name in shown]

    further = " and MAPE in %, R2 a number" if "r2" in shown else " in %"
    title = f"Validation rows{note}. SMAPE{further}, the rest in $"
    first = [_baseline_cells(score, baselines.rows, shown) for score in baselines.scores] if baselines else []
    return _by_group(title, groups, [HEADINGS[name] for name in shown], cells, first)


def _baseline_cells(score: BaselineScore, n_rows: int, shown: Sequence[str]) -> list[str]:
    interval = _interval(score.low, score.high)
    known = {"count": str(n_rows), "share": f"{1:.1%}", "smape": _number(score.smape), "interval": interval}
    return [score.name, *(known.get(name, "") for name in shown)]


def _interval(low: float | None, high: float | None) -> str:
    """Such as "30.24 - 33.60"; "-" if it is not known, as of a single row."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "-"
    return f"{_number(low)} - {_number(high)}"


def _n_metrics(width: int) -> int:
    """Returns how many metrics to show on a terminal of this width."""
    if width < 90:
        return 5
    return 9 if width < 125 else len(HEADINGS)


def _coverage(coverage: pd.DataFrame) -> tables.Table:
    """Returns the table of coverage, with the standard error of the share within 90% bounds if that share is 90%."""
    covered = [str(name) for name in coverage if str(name).startswith("covered_")]
    shares = [f"{name.removeprefix('covered_')}%" for name in covered]

    def cells(row: dict[Hashable, Any]) -> list[str]:
        percents = [f"{row[name]:.1%}" for name in (*covered, "error")]
        return [str(row["count"]), *percents, readable(row["factor_90"])]

    title = "Intervals: share of the true prices inside, and the factor from the price to a bound of 90%"
    return _by_group(title, coverage, ["rows", *shares, "s.e. of 90%", "factor"], cells)


def _by_group(
    title: str,
    frame: pd.DataFrame,
    headings: list[str],
    cells: Callable[[dict[Hashable, Any]], list[str]],
    first: Sequence[list[str]] = (),
) -> tables.Table:
    """Returns a table of the groups, with a section per column that rows are grouped by.

    Args:
        cells: formats a row.
        first: rows above the groups.
    """
    table = tables.table(title, "group", *headings, numbers=headings, max_width={"group": TEXT_WIDTH})
    for above in first:
        tables.add(table, *above)
    for by, part in frame.groupby("by", sort=False):
        if by != "overall":
            table.add_section()
            tables.add(table, f"by {by}", style="bold")
        for row in part.to_dict("records"):
            tables.add(table, str(row["group"]), *cells(row))
    return table


def _plain(title: str, frame: pd.DataFrame, width: int) -> tables.Table:
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
    table = tables.table(title, *cells, numbers=numbers, max_width=dict.fromkeys(texts, text_width))
    for row in zip(*cells.values(), strict=True):
        tables.add(table, *row)
    return table


def _number(cell: object) -> str:
    """Formats a float readably, NaN as "-", and any other value as text on one line without control characters."""
    if not isinstance(cell, float):
        return visible(" ".join(str(cell).split()))
    if math.isnan(cell):
        return "-"
    return readable(cell)
