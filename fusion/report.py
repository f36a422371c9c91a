"""What an evaluation looks like on a terminal."""

from __future__ import annotations

import math
import sys
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

TEXT_WIDTH = 44
PLAIN_WIDTH = 140  # columns where standard output is no terminal


def show(
    groups: pd.DataFrame, worst: pd.DataFrame, best: pd.DataFrame, gates: pd.DataFrame, distributions: pd.DataFrame
) -> None:
    """Prints metrics by group, the extreme rows, the distributions and the gate's use on standard output."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(_groups(groups))
    for title, rows in (("Worst rows", worst), ("Best rows", best)):
        columns = [column for column in rows.columns if column in ("sample_id", "price", "predicted", "smape")]
        columns += [column for column in ("catalog_content", "category") if column in rows.columns]
        console.print(_plain(f"{title}, by SMAPE", rows[columns]))
    console.print(_plain("Distributions: $ true, $ predicted, $ error, % SMAPE of a row", distributions))
    if not gates.empty:
        console.print(_plain("Share of the gate by expert and price bin", gates.rename_axis("bin").reset_index()))


def _groups(groups: pd.DataFrame) -> Table:
    table = Table(title="Validation rows: SMAPE, MAPE in %, the rest in $", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("group", no_wrap=True, max_width=TEXT_WIDTH)
    heads = [
        "rows",
        "share",
        "SMAPE",
        "95% interval",
        "MAE",
        "RMSE",
        "MAPE",
        "R2",
        "median err",
        "bias",
        "true",
        "pred",
    ]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, part in groups.groupby("by", sort=False):
        if name != "overall":
            table.add_section()
            table.add_row(f"by {name}", *[""] * len(heads), style="bold")
        for row in part.to_dict("records"):
            table.add_row(*_cells(row))
    return table


def _cells(row: dict[Any, Any]) -> list[str]:
    low, high = _number(row["smape_low"], 1), _number(row["smape_high"], 1)
    names = ("mae", "rmse", "mape")
    more = ("median_error", "bias", "mean_true", "mean_pred")
    return [
        str(row["group"]),
        str(row["count"]),
        f"{row['share']:.1%}",
        _number(row["smape"], 2),
        "-" if low == "-" else f"{low} - {high}",
        *(_number(row[name], 2) for name in names),
        _number(row["r2"], 3),
        *(_number(row[name], 2) for name in more),
    ]


def _plain(title: str, frame: pd.DataFrame) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in frame.columns:
        number = pd.api.types.is_numeric_dtype(frame[column])
        table.add_column(str(column), justify="right" if number else "left", no_wrap=True, max_width=TEXT_WIDTH)
    for row in frame.itertuples(index=False):
        table.add_row(*(_number(cell, 2) if isinstance(cell, float) else " ".join(str(cell).split()) for cell in row))
    return table


def _number(value: object, digits: int) -> str:
    number = float(str(value))
    return "-" if math.isnan(number) else f"{number:.{digits}f}"
