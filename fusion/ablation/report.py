"""Prints an ablation on a terminal."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.errors import visible
from fusion.records.schemas import AblationRecord, Effect

PLAIN_WIDTH = 100  # characters per line if standard output is not a terminal


def show(record: AblationRecord) -> None:
    """Prints a table of the sources, the one with the largest Shapley value first."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    note = ", with other prices or embeddings than in training" if record.as_trained is False else ""
    title = f"SMAPE in %, on {record.rows} validation rows in {record.groups} groups of near-duplicates{note}"
    console.print(Text(title, style="bold"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("role", "source"):
        table.add_column(heading, overflow="fold")
    for heading in ("alone", "without", "lost without", "Shapley value", "95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in sorted(record.sources, key=lambda one: -one.shapley.mean):
        figures = (f"{one.alone:.2f}", f"{one.without:.2f}", _effect(one.lost), _effect(one.shapley))
        table.add_row(*(Text(visible(cell)) for cell in (one.role, one.source, *figures, _interval(one.shapley))))
    console.print(table)
    gain = record.nothing - record.everything
    ends = f"SMAPE is {record.nothing:.2f} with no source and {record.everything:.2f} with all"
    console.print(f"{ends}: the Shapley values add up to {gain:.2f}")


def _effect(effect: Effect) -> str:
    return f"{effect.mean:+.2f}" if effect.error is None else f"{effect.mean:+.2f} +- {effect.error:.2f}"


def _interval(effect: Effect) -> str:
    return "-" if effect.low is None else f"{effect.low:.2f} - {effect.high:.2f}"
