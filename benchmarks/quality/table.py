"""The table of results: out-of-fold SMAPE, its standard error, and the paired difference to a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.quality.blend import nested_blend
from benchmarks.quality.catalog import Catalog
from benchmarks.quality.predictions import Prediction
from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.errors import ConfigError
from fusion.metrics import row_smape

BLEND = "best convex blend"


@dataclass(frozen=True)
class Score:
    """A line of the table.

    Attributes:
        errors: [N] SMAPE of each row, NaN for rows without a prediction.
        smape: their mean, in percent.
        difference: to the reference, over the rows that both predict; None for the reference itself, or if there are no
            such rows.
    """

    prediction: Prediction
    errors: np.ndarray
    smape: Estimate
    difference: Estimate | None = None
    is_reference: bool = False

    @property
    def rows(self) -> int:
        return int((~np.isnan(self.errors)).sum())

    @property
    def label(self) -> str:
        """The name by which --reference selects it."""
        return f"{self.prediction.name}, {self.prediction.inputs}"


def blends(peers: Sequence[Prediction], ours: Sequence[Prediction], catalog: Catalog) -> list[Prediction]:
    """The best convex blends: of the peers with each kind of inputs, of all peers, and of these and Fusion's runs."""
    whole = [one for one in peers if one.covered.all()]
    kinds = dict.fromkeys(one.inputs for one in whole if one.inputs != "prices")
    sets = {f"peers on {kind}": [one for one in whole if one.inputs in (kind, "prices")] for kind in kinds}
    if len(kinds) > 1:
        sets["all of the peers"] = whole
    if any(one.covered.all() for one in ours):
        sets["peers and Fusion"] = [*whole, *(one for one in ours if one.covered.all())]
    return [_blend(inputs, members, catalog) for inputs, members in sets.items() if len(members) > 1]


def _blend(inputs: str, members: Sequence[Prediction], catalog: Catalog) -> Prediction:
    logs, weights = nested_blend(np.stack([one.logs for one in members]), catalog.logs, catalog.folds)
    named = {f"{one.name}, {one.inputs}": float(weight) for one, weight in zip(members, weights, strict=True)}
    kept = {name: round(weight, 3) for name, weight in named.items() if weight >= 0.005}  # others would show as 0.00
    return Prediction(BLEND, inputs, logs, sum(one.minutes for one in members), weights=kept)


def scored(predictions: Sequence[Prediction], catalog: Catalog) -> list[Score]:
    return [_score(one, catalog) for one in predictions]


def _score(prediction: Prediction, catalog: Catalog) -> Score:
    covered, errors = prediction.covered, np.full(len(catalog.prices), np.nan)
    errors[covered] = row_smape(catalog.prices[covered], np.exp(prediction.logs[covered]))
    return Score(prediction, errors, clustered_mean(errors[covered], catalog.groups[covered]))


def compared(scores: Sequence[Score], reference: str | None, catalog: Catalog) -> list[Score]:
    """The scores with their differences to the reference, grouped by inputs, and from worst to best in each group."""
    base = _reference(scores, reference)
    kinds = list(dict.fromkeys(one.prediction.inputs for one in scores))
    ordered = sorted(scores, key=lambda one: (kinds.index(one.prediction.inputs), -one.smape.mean))
    return [replace(one, is_reference=True) if one is base else _difference(one, base, catalog) for one in ordered]


def _reference(scores: Sequence[Score], named: str | None) -> Score:
    if named is not None:
        found = [one for one in scores if named in (one.prediction.name, one.label)]
        if len(found) == 1:
            return found[0]
        there = "; ".join(repr(one.label) for one in found or scores)
        raise ConfigError(
            f"--reference is {named!r}, which is the name of {len(found)} predictions; there are {there}",
            f"--reference {(found or scores)[0].label!r}",
        )
    candidates = [one for one in scores if one.prediction.name != BLEND]
    candidates = [one for one in candidates if one.prediction.is_ours] or candidates
    most = max(one.rows for one in candidates)  # for some, not all folds may have been computed
    return min([one for one in candidates if one.rows == most], key=lambda one: one.smape.mean)


def _difference(score: Score, base: Score, catalog: Catalog) -> Score:
    differences = score.errors - base.errors
    both = ~np.isnan(differences)
    if not both.any():
        return score
    return replace(score, difference=clustered_mean(differences[both], catalog.groups[both]))


def markdown(scores: Sequence[Score], catalog: Catalog) -> str:
    n_rows, n_groups, n_folds = len(catalog.ids), len(np.unique(catalog.groups)), len(np.unique(catalog.folds))
    lines = [
        f"Out-of-fold SMAPE of {n_rows:,} rows in {n_groups:,} groups and {n_folds} folds (standard error by group)",
        "",
        "| inputs | model | SMAPE | difference | minutes |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [_line(score, n_rows) for score in scores]
    lines += ["", *(_weights(score.prediction) for score in scores if score.prediction.weights)]
    return "\n".join(lines) + "\n"


def _line(score: Score, n_rows: int) -> str:
    one = score.prediction
    rows = "" if score.rows == n_rows else f" on {score.rows:,} rows"
    difference = "reference" if score.is_reference else _shown(score.difference, "+.2f")
    minutes = "" if math.isnan(one.minutes) else f"{one.minutes:.1f}"
    return f"| {one.inputs} | {one.name} | {_shown(score.smape, '.2f')}{rows} | {difference} | {minutes} |"


def _shown(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return ""
    error = "" if estimate.error is None else f" ({estimate.error:.2f})"
    return f"{estimate.mean:{form}}{error}"


def _weights(blend: Prediction) -> str:
    named = ", ".join(f"{weight:.2f} {name}" for name, weight in (blend.weights or {}).items())
    return f"Weights of the blend of {blend.inputs}: {named}.\n"


def document(scores: Sequence[Score], catalog: Catalog) -> dict[str, Any]:
    """The content of the table as JSON; null for empty cells."""
    return {
        "rows": len(catalog.ids),
        "groups": len(np.unique(catalog.groups)),
        "folds": len(np.unique(catalog.folds)),
        "data": catalog.digest,
        "models": [_record(score) for score in scores],
    }


def _record(score: Score) -> dict[str, Any]:
    one = score.prediction
    return {
        "name": one.name,
        "inputs": one.inputs,
        "rows": score.rows,
        "smape": asdict(score.smape),
        "difference": None if score.difference is None else asdict(score.difference),
        "minutes": None if math.isnan(one.minutes) else round(one.minutes, 2),
        "weights": one.weights,
    }
