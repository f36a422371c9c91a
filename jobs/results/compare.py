"""What differs between runs: their settings, their SMAPE, and their metrics group by group."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusion import storage
from fusion.errors import DataError, UsageError
from fusion.manifests import split_digest, validated
from fusion.records import RunFacts, read

NAMES = {"by", "group"}
WHERE = {"output", "run_id"}  # different for any two runs


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side; each list has one value per run.

    Attributes:
        variants: empty for a run that never read its data.
        settings: those that differ; None where a run's variant has no such setting.
        smape: validation SMAPE of the best checkpoint, in %; None before the first.
        metric: of the groups.
        groups: (by, group) to the metric; None where a run has no such group. Empty unless two runs were evaluated.
        not_evaluated: runs without metrics by groups.
        same_rows: whether all validated on the same rows, so that the figures can be compared at all.
    """

    runs: list[str]
    variants: list[str]
    smape: list[float | None]
    settings: dict[str, list[Any]]
    metric: str
    groups: dict[tuple[str, str], list[float | None]]
    not_evaluated: list[str]
    same_rows: bool


def compare(runs: Sequence[str], metric: str = "smape") -> Comparison:
    """Compares runs, given by their URLs.

    Raises:
        DataError: a run lacks its settings, or they are damaged.
        UsageError: there is no such metric.
    """
    settings = [dict(_flat(_settings(storage.join(run, "config.json")))) for run in runs]
    metrics = [_groups(run, metric) for run in runs]
    evaluated = [groups for groups in metrics if groups]
    keys = dict.fromkeys(key for one in settings for key in one if key not in WHERE)
    groups = dict.fromkeys(key for one in evaluated for key in one)
    return Comparison(
        [storage.base(run) for run in runs],
        [_variant(run) for run in runs],
        [_smape(run) for run in runs],
        {key: [one.get(key) for one in settings] for key in keys if _differ([one.get(key) for one in settings])},
        metric,
        {key: [one.get(key) for one in metrics] for key in groups} if len(evaluated) > 1 else {},
        [storage.base(run) for run, found in zip(runs, metrics, strict=True) if not found],
        _same_rows(runs),
    )


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _smape(run: str) -> float | None:
    return min((checkpoint.smape for checkpoint in validated(run)), default=None)


def _same_rows(runs: Sequence[str]) -> bool:
    digests = {split_digest(run) for run in runs}
    return len(digests) == 1 and "" not in digests


def _variant(run: str) -> str:
    facts = read(RunFacts, storage.join(run, "run.json"))
    return facts.variant if facts else ""


def _settings(url: str) -> dict[str, Any]:
    try:
        values = json.loads(storage.read(url))
    except ValueError as error:
        raise _damaged(url, str(error)) from error
    if not isinstance(values, dict):
        raise _damaged(url, f"expected an object with settings, found {values!r:.80}")
    return values


def _damaged(url: str, cause: str) -> DataError:
    return DataError(
        f"{url} is damaged: {cause}", "compare other runs; `python -m fusion.verify URL` says what else is"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _groups(run: str, metric: str) -> dict[tuple[str, str], float | None]:
    """(by, group) to the metric; empty when the run has not been evaluated."""
    url = storage.join(run, "metrics", "groups.csv")
    data = storage.read_if_exists(url)
    if data is None:
        return {}
    try:
        return dict(_values(url, data.decode(), metric))
    except (ValueError, csv.Error) as error:
        raise _damaged(url, str(error)) from error


def _values(url: str, text: str, metric: str) -> Iterator[tuple[tuple[str, str], float | None]]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    columns = rows.fieldnames or []
    if not set(columns) >= NAMES:
        raise ValueError(f"expected the columns by and group, found {', '.join(columns) or 'none'}")
    if metric not in set(columns) - NAMES:
        known = ", ".join(name for name in columns if name not in NAMES)
        raise UsageError(f"--metric is {metric!r}, which {url} does not have", f"choose one of {known}")
    for row in rows:
        if row[metric] is None:
            raise ValueError(f"line {rows.line_num} has fewer fields than the first")
        value = float(row[metric]) if row[metric] else None  # empty: not defined for this group
        yield (row["by"], row["group"]), value if value is None or math.isfinite(value) else None
