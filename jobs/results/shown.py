"""Tables of runs, submissions and comparisons on standard output.

Text from a bucket is shown, never obeyed: markup is off, and control characters are written out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.errors import visible
from jobs.results.bucket import Run, Submission
from jobs.results.compare import Comparison

PLAIN_WIDTH = 150  # columns where standard output is no terminal


def runs(found: Sequence[Run], output: str) -> None:
    table = _table(f"Runs in {output}", "run", "variant", "SMAPE", "started", "state", "attempts", "why")
    for run in found:
        state = run.state if run.code in (None, 0) else f"{run.state} ({run.code})"
        _add(table, run.run_id, run.variant, _cell(run.smape), run.started, state, str(run.attempts), run.error)
    _print(table, len(found))


def submissions(found: Sequence[Submission], output: str) -> None:
    table = _table(f"Submissions in {output}", "name", "date", "digest", "rows", "run", "", "why")
    for one in found:
        rows = "-" if one.rows is None else str(one.rows)
        _add(table, one.name, one.date, one.digest, rows, one.run, "current" if one.current else "", one.error)
    _print(table, len(found))


def comparison(found: Comparison) -> None:
    settings = _table("What differs", "", *found.runs)
    _add(settings, "validation SMAPE", *map(_cell, found.smape), style="bold")
    for key, values in found.settings.items():
        _add(settings, key, *map(_cell, values))
    _print(settings, 1)
    if found.groups:
        groups = _table(f"{found.metric} by group", "by", "group", *found.runs)
        for (by, group), values in found.groups.items():
            _add(groups, by, group, *map(_cell, values))
        _print(groups, 1)
    for run in found.not_evaluated:
        print(f"note: {visible(run)} has no metrics by group; evaluate_by_groups --run-id {visible(run)} makes them")
    if not found.same_rows:
        print("note: these runs did not validate on the same rows; their figures differ for that reason as well")


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=_text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0)
    )
    for heading in headings:
        right = heading in ("SMAPE", "rows", "attempts")
        table.add_column(_text(heading), justify="right" if right else "left", overflow="fold")
    return table


def _add(table: Table, *cells: str, style: str | None = None) -> None:
    table.add_row(*map(_text, cells), style=style)


def _text(text: str) -> Text:
    return Text(visible(text))


def _print(table: Table, n_rows: int) -> None:
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False).print(table if n_rows else "none")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) and abs(value) >= 0.01 else str(value)
