"""Compares runs on the rows that all of them validated on.

Standard errors take into account that the errors of near-duplicates are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.compare.out_of_fold import OF_FOLD, Scored, same_rows, shared
from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.metrics import row_smape
from fusion.records.run import differing

# Rows that two runs have to share to be compared. The SMAPE of a row is about 40, with a standard deviation of 40, so
# the mean over fewer rows has a standard error of more than 4.
MIN_SHARED = 100


@dataclass(frozen=True)
class Entry:
    """A run, or the fold runs of one recipe, on the shared rows.

    Attributes:
        smape: mean over the rows, in percent, with a 95% interval.
        to_best: mean over the rows of the SMAPE minus that of the best run; None for the best run itself.
        parameters: of the model of the first run; None if that is not known.
        minutes: duration of all attempts together; None if that is not known.
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
        rows: number of rows that it validated on.
        shared: number of these that the best run validated on too.
        smape, best_smape: of this run and of the best one on the shared rows, in percent; None if there are fewer than
            `MIN_SHARED`.
        to_best: as in `Entry`; None if there are fewer than `MIN_SHARED` shared rows.
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
    """The result of a comparison.

    Attributes:
        rows, groups: number of rows that all of `runs` validated on, and of the groups of near-duplicates among them.
        runs: the runs that validated on these rows, the best one first.
        apart: the runs that validated on other rows.
        settings: settings that differ between runs, each with its values for all of `runs` and then all of `apart`.
    """

    rows: int
    groups: int
    runs: list[Entry]
    apart: list[Apart]
    settings: dict[str, list[Any]]


def compare(found: Sequence[Scored]) -> Comparison:
    """Compares runs on their validation rows.

    If runs validated on different rows, those that most runs validated on are used; the other runs are listed apart.
    """
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
    """Returns the settings that differ between runs, each with a value per run; None for ensembles."""
    columns = [column for column, one in enumerate(found) if one.members[0].settings]
    differ = differing([_settings(found[column]) for column in columns], OF_FOLD - {"fold"})
    full: dict[str, list[Any]] = {key: [None] * len(found) for key in differ}
    for key, values in differ.items():
        for column, value in zip(columns, values, strict=True):
            full[key][column] = value
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
    smape, of_best = (row_smape(rows.prices, predicted) for predicted in rows.predicted)
    return Apart(*head, float(smape.mean()), float(of_best.mean()), clustered_mean(smape - of_best, rows.groups))
