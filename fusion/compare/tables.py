"""Prints a comparison of runs on a terminal, in at most 100 columns for any number of runs."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from rich.console import Console

from fusion.compare.comparison import MIN_SHARED, Apart, Comparison
from fusion.compare.standard_errors import Estimate
from fusion.records.schemas import Effect
from fusion.terminal import tables

RUNS_PER_TABLE = 6  # runs whose settings fit beside each other in 100 columns; more runs get another table


def show(found: Comparison) -> None:
    """Prints the comparison on standard output."""
    console = tables.console()
    title = f"{found.rows} rows that all of them validated on, in {found.groups} groups of near-duplicates"
    _print(console, title, _runs(found))
    if found.apart:
        _print(console, "Listed apart: they validated on other rows", _apart(found.apart, first=len(found.runs)))
    n_runs = len(found.runs) + len(found.apart)
    if found.settings:
        for first in range(0, n_runs, RUNS_PER_TABLE):
            _print(console, "Settings that differ", _settings(found.settings, first))
    for line in _verdict(found):
        console.print(tables.text(line))


def _runs(found: Comparison) -> tables.Table:
    """Returns the table of the runs that validated on the same rows, each with a letter that the other tables use."""
    table = _table("", "run", "SMAPE", "95% interval", "to the best", "parameters", "minutes")
    for letter, entry in enumerate(found.runs):
        tables.add(
            table,
            _letter(letter),
            entry.name if entry.finished else f"{entry.name} (unfinished)",
            f"{entry.smape.mean:.2f}",
            interval(entry.smape),
            difference(entry.to_best),
            "-" if entry.parameters is None else f"{entry.parameters:,}",
            "-" if entry.minutes is None else f"{entry.minutes:.1f}",
        )
    return table


def _apart(apart: Sequence[Apart], first: int) -> tables.Table:
    """Returns the table of the runs that validated on other rows; their letters start at number `first`."""
    table = _table("", "run", "rows", "shared", "SMAPE there", "best there", "to the best")
    for letter, one in enumerate(apart, first):
        scores = ["-" if value is None else f"{value:.2f}" for value in (one.smape, one.best_smape)]
        counts = (str(one.rows), str(one.shared))
        tables.add(table, _letter(letter), one.name, *counts, *scores, difference(one.to_best))
    return table


def _settings(settings: dict[str, list[Any]], first: int) -> tables.Table:
    """Returns the table of settings that differ, for `RUNS_PER_TABLE` runs from number `first` on."""
    n_runs = min(RUNS_PER_TABLE, len(next(iter(settings.values()))) - first)
    table = _table("", *(_letter(first + i) for i in range(n_runs)))
    for key, values in settings.items():
        tables.add(table, key, *map(_cell, values[first : first + n_runs]))
    return table


def _verdict(found: Comparison) -> list[str]:
    """Returns sentences that say which differences to the best run, A, are more than chance."""
    undecided = [
        _letter(i)
        for i, entry in enumerate(found.runs)
        if entry.to_best is not None and not entry.to_best.is_significant
    ]
    lines = []
    if undecided:
        lines.append(
            f"A is not significantly better than {', '.join(undecided)}: "
            "the difference is less than twice its standard error"
        )
    elif len(found.runs) > 1:
        lines.append("A is better than every other run by more than twice the standard error of the difference")
    incomparable = [one.name for one in found.apart if one.to_best is None]
    if incomparable:
        names = ", ".join(incomparable)
        lines.append(f"do not compare with A: {names}: fewer than {MIN_SHARED} shared validation rows")
    return lines


def _print(console: Console, title: str, table: tables.Table) -> None:
    console.print(tables.text(title, "bold"))  # rich would wrap a table's own title at the width of the table
    console.print(table)


def _table(*headings: str) -> tables.Table:
    texts = ("run", *ascii_uppercase)
    return tables.table("", *headings, numbers={*headings} - {"", *texts}, folded=texts)


def _letter(number: int) -> str:
    """Returns the letter that stands for a run, from 0; a number after the 26th run."""
    return ascii_uppercase[number] if number < len(ascii_uppercase) else str(number + 1)


def interval(estimate: Estimate | Effect) -> str:
    return "-" if estimate.low is None else f"{estimate.low:.2f} - {estimate.high:.2f}"


def difference(estimate: Estimate | Effect | None) -> str:
    """The mean with its sign, and its standard error."""
    if estimate is None:
        return "-"
    return f"{estimate.mean:+.2f}" if estimate.error is None else f"{estimate.mean:+.2f} +- {estimate.error:.2f}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
