"""Shows how runs differ: in their settings, their SMAPE, and their metrics by group.

All figures come from files that the runs have written. For a test of which run is better, with standard errors, use
`python -m fusion.compare`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusion import storage
from fusion.errors import UsageError
from fusion.records.run import RunFolder, damaged, differing

NAMES = {"by", "group"}  # columns of groups.csv that are not metrics
IGNORED = {"output", "run_id"}  # settings that differ between any two runs


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side. Each list has one value per run.

    Attributes:
        variants: empty text for a run that ended before it had read its data.
        smape: validation SMAPE of the best checkpoint, in %; None before the first checkpoint.
        settings: the settings that differ, by name; None where a run's variant has no such setting.
        metric: name of the metric in `groups`.
        groups: values of the metric by (by, group); None where a run has no such group. Empty unless at least two runs
            were evaluated.
        not_evaluated: runs without metrics by group.
        same_rows: whether all runs validated on the same rows; otherwise their figures cannot be compared.
    """

    runs: list[str]
    variants: list[str]
    smape: list[float | None]
    settings: dict[str, list[Any]]
    metric: str
    groups: dict[tuple[str, str], list[float | None]]
    not_evaluated: list[str]
    same_rows: bool


def compare(runs: Sequence[RunFolder], metric: str = "smape") -> Comparison:
    """Compares runs.

    Args:
        metric: a column of metrics/groups.csv.

    Raises:
        DataError: a run's config.json or groups.csv is missing or damaged.
        UsageError: there is no such metric.
    """
    settings = [run.settings() for run in runs]
    metrics = [_groups(run, metric) for run in runs]
    evaluated = [groups for groups in metrics if groups]
    groups = dict.fromkeys(key for one in evaluated for key in one)
    return Comparison(
        [run.run_id for run in runs],
        [run.variant() for run in runs],
        [_smape(run) for run in runs],
        differing(settings, IGNORED),
        metric,
        {key: [one.get(key) for one in metrics] for key in groups} if len(evaluated) > 1 else {},
        [run.run_id for run, found in zip(runs, metrics, strict=True) if not found],
        _same_rows(runs),
    )


def _smape(run: RunFolder) -> float | None:
    return min((checkpoint.smape for checkpoint in run.validated()), default=None)


def _same_rows(runs: Sequence[RunFolder]) -> bool:
    digests = {run.split_digest() for run in runs}
    return len(digests) == 1 and "" not in digests


def _groups(run: RunFolder, metric: str) -> dict[tuple[str, str], float | None]:
    """Values of the metric by (by, group); empty when the run has not been evaluated."""
    url = run.at("metrics", "groups.csv")
    data = storage.read_if_exists(url)
    if data is None:
        return {}
    try:
        return dict(_values(url, data.decode(), metric))
    except (ValueError, csv.Error) as error:
        raise damaged(url, str(error)) from error


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
        # An empty cell or nan: the metric is not defined for this group, as R² of one row is not.
        value = float(row[metric] or "nan")
        yield (row["by"], row["group"]), value if math.isfinite(value) else None
