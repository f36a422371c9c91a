"""Tables of runs, submissions and comparisons on standard output.

Text from a bucket is shown, never obeyed: markup is off, and control characters are written out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.errors import ExitCode, visible
from jobs.results.bucket import Run, Submission
from jobs.results.compare import Comparison

PLAIN_WIDTH = 150  # columns where standard output is no terminal


def runs(found: Sequence[Run], output: str, failed: bool = False) -> None:
    """The runs in their order; those that failed before they had a model only if asked for, or alone."""
    tries = [run for run in found if run.is_failed_try]
    shown = list(found) if failed else [run for run in found if not run.is_failed_try] or tries
    if not shown:
        print(f"no runs in {visible(output)}")
        return
    splits = _letters(run.split for run in shown)
    table = _table(f"Runs in {output}", "run", "variant", "SMAPE", "split", "started (UTC)", "state", "attempts")
    for run in shown:
        started, split = run.started.removesuffix("Z").replace("T", " "), splits.get(run.split, "-")
        _add(table, run.run_id, run.variant, _cell(run.smape), split, started, _standing(run), str(run.attempts))
    _print(table)
    _explain(shown, len(splits), len(found) - len(shown))


def _letters(splits: Iterable[str]) -> dict[str, str]:
    """A name for each split that is shown: A, B, …, Z, 27, …"""
    names = enumerate(dict.fromkeys(split for split in splits if split))
    return {split: ascii_uppercase[i] if i < len(ascii_uppercase) else str(i + 1) for i, split in names}


def _standing(run: Run) -> str:
    if run.served:
        return f"{run.state}, served"
    return run.state if run.code in (None, ExitCode.DONE) else f"{run.state} ({run.code})"


def _explain(shown: Sequence[Run], n_splits: int, n_hidden: int) -> None:
    for run in shown:
        if run.error:
            print(f"{visible(run.run_id)}: {visible(run.error)}")
    if n_splits > 1:
        print("SMAPE can be compared between runs of one split: they validated on the same rows")
    if n_hidden:
        tries = "1 failed try" if n_hidden == 1 else f"{n_hidden} failed tries"
        print(f"{tries} without a model: see --failed")


def submissions(found: Sequence[Submission], output: str) -> None:
    if not found:
        print(f"no submissions in {visible(output)}")
        return
    table = _table(f"Submissions in {output}", "name", "date", "digest", "rows", "run", "", "why")
    for one in found:
        rows = "-" if one.rows is None else str(one.rows)
        _add(table, one.name, one.date, one.digest, rows, one.run, "current" if one.current else "", one.error)
    _print(table)


def comparison(found: Comparison) -> None:
    settings = _table("What differs", "", *found.runs)
    _add(settings, "validation SMAPE", *map(_cell, found.smape), style="bold")
    for key, values in found.settings.items():
        _add(settings, key, *map(_cell, values))
    _print(settings)
    if found.groups:
        groups = _table(f"{found.metric} by group", "by", "group", *found.runs)
        for (by, group), values in found.groups.items():
            _add(groups, by, group, *map(_cell, values))
        _print(groups)
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


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) and abs(value) >= 0.01 else str(value)
