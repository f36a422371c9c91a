"""Prints tables of runs, submissions and comparisons on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from fusion.errors import ExitCode
from fusion.jobs.results.bucket import Run, Submission
from fusion.jobs.results.compare import Comparison
from fusion.terminal import tables
from fusion.terminal.escapes import visible
from fusion.terminal.spelling import as_typed

MINUTE = len("2026-01-02T03:04")  # times are shown to the minute
NUMBERS = ("SMAPE", "rows", "tries")  # columns that are aligned on the right
MIN_FIXED_POINT = 0.01  # smaller numbers, such as a learning rate, would be rounded to 0.00 with two digits


def runs(found: Sequence[Run], output: str, *, failed: bool = False, width: int | None = None) -> None:
    """Prints the runs in the given order.

    Args:
        failed: also show runs that failed before they had a model. If there are no others, these are shown anyway.
        width: columns of the terminal; a table that is wider leaves out the variant. None: any width.
    """
    with_model = [run for run in found if not run.is_failed_try]
    shown = with_model if with_model and not failed else list(found)
    if not shown:
        print(f"no runs in {visible(output)}")
        return
    splits = _letters(run.split for run in shown)
    table = _runs_table(shown, splits, output, ("run", "variant", "SMAPE", "split", "started (UTC)", "state", "tries"))
    if width is not None and tables.width(table) > width:
        table = _runs_table(shown, splits, output, ("run", "SMAPE", "split", "started (UTC)", "state", "tries"))
    tables.show(table)
    _explain(shown, len(splits), len(found) - len(shown))


def _runs_table(shown: Sequence[Run], splits: Mapping[str, str], output: str, columns: Sequence[str]) -> tables.Table:
    table = tables.table(f"Runs in {output}", *columns, numbers=NUMBERS)
    for run in shown:
        cells = {
            "run": run.run_id,
            "variant": run.variant,
            "SMAPE": _cell(run.smape),
            "split": splits.get(run.split, "-"),
            "started (UTC)": run.started[:MINUTE].replace("T", " "),
            "state": _state_cell(run),
            "tries": str(run.attempts),
        }
        tables.add(table, *(cells[column] for column in columns))
    return table


def _letters(splits: Iterable[str]) -> dict[str, str]:
    """A short name for each split: A, B, …, Z, 27, 28, …"""
    names = enumerate(dict.fromkeys(split for split in splits if split))
    return {split: ascii_uppercase[i] if i < len(ascii_uppercase) else str(i + 1) for i, split in names}


def _state_cell(run: Run) -> str:
    if run.served:
        return "served"
    return run.state if run.code in (None, ExitCode.DONE) else f"{run.state} ({run.code})"


def _explain(shown: Sequence[Run], n_splits: int, n_hidden: int) -> None:
    _print_errors((run.run_id, run.error) for run in shown)
    if n_splits > 1:
        print("SMAPE can be compared between runs with the same split letter: they validated on the same rows")
    if n_hidden:
        tries = "1 failed try" if n_hidden == 1 else f"{n_hidden} failed tries"
        print(f"{tries} without a model: add --failed to list them")


def _print_errors(errors: Iterable[tuple[str, str]]) -> None:
    for name, error in errors:
        if error:
            print(f"{visible(name)}: {visible(error)}")


def submissions(found: Sequence[Submission], output: str) -> None:
    if not found:
        print(f"no submissions in {visible(output)}")
        return
    table = tables.table(f"Submissions in {output}", "name", "date", "digest", "rows", "run", "", numbers=NUMBERS)
    for one in found:
        rows = "-" if one.rows is None else str(one.rows)
        tables.add(table, one.name, one.date, one.digest, rows, one.run, "current" if one.current else "")
    tables.show(table)
    _print_errors((f"{one.name}/{one.date}/{one.digest}", one.error) for one in found)


def comparison(found: Comparison, output: str) -> None:
    settings = tables.table("What differs", "", *found.runs)
    if len(set(found.variants)) > 1:
        tables.add(settings, "variant", *found.variants)
    tables.add(settings, "validation SMAPE", *map(_cell, found.smape), style="bold")
    for key, values in found.settings.items():
        tables.add(settings, key, *map(_cell, values))
    tables.show(settings)
    if found.groups:
        groups = tables.table(f"{found.metric} by group", "by", "group", *found.runs)
        for (by, group), values in found.groups.items():
            tables.add(groups, by, group, *map(_cell, values))
        tables.show(groups)
    for run in found.not_evaluated:
        variant = found.variants[found.runs.index(run)] or "VARIANT"
        command = f"python -m fusion.{variant}.evaluate_by_groups --output {output} --run-id {run}"
        print(visible(as_typed(f"note: {run} has no metrics by group; `{command}` makes them")))
    if not found.same_rows:
        print("note: these runs did not validate on the same rows, so that their figures cannot be compared directly")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) and abs(value) >= MIN_FIXED_POINT else str(value)
