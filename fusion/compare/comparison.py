"""Runs side by side on the rows that all of them validated on, with errors that know of near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.compare.out_of_fold import OF_FOLD, Scored, same_rows, shared
from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.metrics import row_smape
from fusion.records.run import differing

MIN_SHARED = 100  # rows: with an error of 40 +- 40 a row, the mean of fewer is off by more than 4


@dataclass(frozen=True)
class Entry:
    """One run on the shared rows.

    Attributes:
        smape: in %, with its 95% interval.
        to_best: mean of the row SMAPEs minus those of the best run; None for the best itself.
        minutes: of all attempts, None where none says.
    """

    name: str
    run_ids: list[str]
    variant: str
    finished: bool
    smape: Estimate
    to_best: Estimate | None
    parameters: int | None
    minutes: float | None


@dataclass(frozen=True)
class Apart:
    """A run that validated on other rows.

    Attributes:
        rows: that it validated on.
        shared: of these, rows that the best run validated on too.
        smape, best_smape: of both on the shared rows, in %; None where these are too few.
        to_best: as in `Entry`.
    """

    name: str
    run_ids: list[str]
    rows: int
    shared: int
    smape: float | None
    best_smape: float | None
    to_best: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, the best first.

    Attributes:
        rows, groups: that all of `runs` validated on.
        settings: those that differ, each with one value per run of `runs` and then of `apart`.
    """

    rows: int
    groups: int
    runs: list[Entry]
    apart: list[Apart]
    settings: dict[str, list[Any]]


def compare(found: Sequence[Scored]) -> Comparison:
    """Compares runs; of several sets of validation rows, the one that most of the runs have is what counts."""
    counts = [sum(same_rows(one, other) for other in found) for one in found]
    reference = found[int(np.argmax(counts))]
    together = [one for one in found if same_rows(one, reference)]
    others = [one for one in found if not same_rows(one, reference)]
    rows = shared(together)
    errors = np.stack([row_smape(rows.prices, predicted) for predicted in rows.predicted])
    order = np.argsort(errors.mean(axis=1), kind="stable")
    together, errors = [together[i] for i in order], errors[order]
    differences: list[Estimate | None] = [None]
    differences += [clustered_mean(of_run - errors[0], rows.groups) for of_run in errors[1:]]
    return Comparison(
        len(rows),
        len(np.unique(rows.groups)),
        [
            _entry(one, clustered_mean(of_run, rows.groups), difference)
            for one, of_run, difference in zip(together, errors, differences, strict=True)
        ],
        [_apart(one, together[0]) for one in others],
        _differing([*together, *others]),
    )


def _differing(found: Sequence[Scored]) -> dict[str, list[Any]]:
    """Settings in which runs differ; an ensemble has none, and None for each."""
    runs = [place for place, one in enumerate(found) if one.members[0].settings]
    differ = differing([_settings(found[place]) for place in runs], OF_FOLD - {"fold"})
    full: dict[str, list[Any]] = {key: [None] * len(found) for key in differ}
    for key, values in differ.items():
        for place, value in zip(runs, values, strict=True):
            full[key][place] = value
    return full


def _settings(one: Scored) -> dict[str, Any]:
    fold = {} if len(one.members) == 1 else {"fold": "all"}
    return {"variant": one.members[0].variant, **one.members[0].settings, **fold}


def _entry(one: Scored, smape: Estimate, to_best: Estimate | None) -> Entry:
    minutes = [member.run.minutes() for member in one.members]
    known = [value for value in minutes if value is not None]
    return Entry(
        one.name,
        [member.run_id for member in one.members],
        one.members[0].variant,
        all(member.finished for member in one.members),
        smape,
        to_best,
        one.members[0].run.n_parameters(),
        sum(known) if known else None,
    )


def _apart(one: Scored, best: Scored) -> Apart:
    rows = shared([one, best])
    head = (one.name, [member.run_id for member in one.members], len(one.rows), len(rows))
    if len(rows) < MIN_SHARED:
        return Apart(*head, None, None, None)
    mine, others = (row_smape(rows.prices, predicted) for predicted in rows.predicted)
    return Apart(*head, float(mine.mean()), float(others.mean()), clustered_mean(mine - others, rows.groups))
