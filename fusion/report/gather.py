"""Reads what a report needs from the folder of a run. Everything but the predictions may be missing."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fusion import log, storage
from fusion.command.settings import from_json
from fusion.compare.out_of_fold import Scored, scored
from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.config import RunConfig
from fusion.errors import FusionError
from fusion.metrics import row_smape
from fusion.records import intervals, schemas
from fusion.records.manifests import ABLATION, BASELINES, INTERVALS, LINES, SPLIT, VALIDATION, Checkpoint
from fusion.records.run import CONFIG, EXIT, LOG, START, RunFolder
from fusion.records.schemas import (
    AblationRecord,
    AttemptEnd,
    AttemptStart,
    Baselines,
    Intervals,
    MetricsManifest,
    RunFacts,
)
from fusion.records.split import read_split
from fusion.records.validation import has_validation
from fusion.variants import config_class_of

# Rows on which a report measures coverage if no evaluation has: a share of 90% then has a standard error of 0.1 points,
# and the measurement takes 3 seconds.
MOST_COVERED = 100_000
# A pair of a line of the log: key=value, or key="a JSON text".
_PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|\S*)')


@dataclass(frozen=True)
class Attempt:
    """An attempt at the run; `start` or `end` is None if it was not recorded or is damaged."""

    number: int
    start: AttemptStart | None
    end: AttemptEnd | None


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate_by_groups` wrote about the run's checkpoint.

    Attributes:
        rows: of `predictions.parquet`, with sample_id as the index.
        groups: of `groups.parquet`.
        manifest_sha256: of the bytes of `metrics/MANIFEST.json`.
    """

    summary: Mapping[str, Any]
    groups: pd.DataFrame
    rows: pd.DataFrame
    manifest_sha256: str

    @property
    def as_trained(self) -> bool | None:
        found = self.summary.get("as_trained")
        return None if found is None else bool(found)


@dataclass(frozen=True, kw_only=True)
class Validated:
    """What a report shows of a run, and of an ensemble too: the predictions for the validation rows.

    Attributes:
        rows: a row per validation row, by sample_id: price, predicted, group, smape, and perhaps spread and category.
        rows_files: paths of the files that `rows` are from, below the run; the first has the predictions.
        intervals_file: likewise of `intervals`.
        smape: mean over `rows`, in %, with a 95% interval from groups of near-duplicates.
        coverage: table as of `intervals.coverage`, cross-fitted; empty without intervals.
        notices: what is missing or does not fit, in sentences.
    """

    run: RunFolder
    facts: RunFacts | None
    rows: pd.DataFrame
    rows_files: list[str]
    smape: Estimate
    intervals: Intervals | None
    intervals_file: str
    coverage: pd.DataFrame
    evaluated: Evaluated | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def variant(self) -> str:
        return self.facts.variant if self.facts else ""

    @property
    def rows_file(self) -> str:
        return self.rows_files[0]


@dataclass(frozen=True, kw_only=True)
class Gathered(Validated):
    """All that a report shows of a run.

    Attributes:
        config: the settings; None if this version of Fusion does not know the variant or a setting.
        split: of `split.parquet`.
        history: a dict per epoch, as in `train.jsonl`.
        events: lines of the training's log that describe the data, each as key to value, with the path of their file
            under "file".
    """

    settings: Mapping[str, Any]
    config: RunConfig | None
    checkpoint: Checkpoint
    split: pd.DataFrame
    history: list[dict[str, Any]]
    ablation: AblationRecord | None
    baselines: Baselines | None
    attempts: list[Attempt]
    events: list[dict[str, str]]
    n_parameters: int | None
    minutes: float | None


def gather(run: RunFolder) -> Gathered:
    """Reads a run.

    Raises:
        DataError: the run has no validated checkpoint, or its predictions, split or settings are missing or damaged.
    """
    run = absolute(run)
    one, notices = scored(run), list[str]()
    chosen = run.best(one.members[0].checkpoint)
    rows, smape = with_smape(one)
    facts = run.facts_if_whole()
    limits, evaluated = intervals.intervals_of(chosen), _evaluated(run, chosen, notices)
    return Gathered(
        run=run,
        facts=facts,
        rows=rows,
        rows_files=[_rows_file(chosen), SPLIT],
        smape=smape,
        intervals=limits,
        intervals_file=f"checkpoints/{chosen.name}/{INTERVALS}",
        coverage=coverage(rows, limits, evaluated),
        evaluated=evaluated,
        settings=run.settings(),
        config=_config(run, facts, notices),
        checkpoint=chosen,
        split=read_split(run, chosen.manifest.split_sha256),
        history=_history(run, chosen),
        ablation=_ablation(run, chosen, notices),
        baselines=schemas.read_if_whole(Baselines, run.at(BASELINES), "baselines_damaged"),
        attempts=_attempts(run),
        events=_events(run),
        n_parameters=run.n_parameters(),
        minutes=run.minutes(),
        notices=notices + _of(one),
    )


def with_smape(one: Scored) -> tuple[pd.DataFrame, Estimate]:
    """The validation rows with their SMAPE, and its mean."""
    rows = one.rows.assign(smape=row_smape(one.rows["price"], one.rows["predicted"]))
    return rows, clustered_mean(rows["smape"].to_numpy(), rows["group"].to_numpy())


def _rows_file(chosen: Checkpoint) -> str:
    """Earlier versions wrote predictions of the validation rows in evaluations alone."""
    return f"checkpoints/{chosen.name}/{VALIDATION}" if has_validation(chosen) else "metrics/predictions.parquet"


def absolute(run: RunFolder) -> RunFolder:
    """The run with an absolute path, so that its report is the same wherever the command is started."""
    return run if "://" in run.url else RunFolder(str(Path(run.url).absolute()))


def _of(one: Scored) -> list[str]:
    if one.members[0].finished:
        return []
    return ["The training of this run has not finished. All figures are of its best checkpoint so far."]


def _config(run: RunFolder, facts: RunFacts | None, notices: list[str]) -> RunConfig | None:
    try:
        kind = config_class_of(facts.variant if facts else "")
        return from_json(kind, storage.read(run.at(CONFIG)), run.at(CONFIG))
    except FusionError as error:
        log.warning(event="settings_not_known", reason=error.message)
        notices.append(
            "This version of Fusion does not know the variant of this run, or one of its settings. The settings are "
            "shown without their defaults, and without commands that repeat the run."
        )
        return None


def _history(run: RunFolder, chosen: Checkpoint) -> list[dict[str, Any]]:
    """The epochs up to the checkpoint; empty if the file is missing or damaged."""
    content = storage.read_if_exists(run.at("metrics", LINES)) or b""
    try:
        return [json.loads(line) for line in content.splitlines()][: chosen.manifest.epoch]
    except ValueError:
        log.warning(event="history_damaged", file=run.at("metrics", LINES))
        return []


def coverage(rows: pd.DataFrame, limits: Intervals | None, evaluated: Evaluated | None = None) -> pd.DataFrame:
    """How often intervals contain the price, with intervals that were fitted without the row and its group.

    An evaluation has measured that; otherwise it is measured here, on a part of very many rows.
    """
    if limits is None:
        return pd.DataFrame()
    if evaluated is not None and evaluated.as_trained and evaluated.summary.get("intervals"):
        return pd.DataFrame(evaluated.summary["intervals"])
    groups = rows["group"].to_numpy()
    if len(rows) > MOST_COVERED:
        chosen = np.random.default_rng(0).permutation(groups.max() + 1)[groups] % -(-len(rows) // MOST_COVERED) == 0
        rows, groups = rows[chosen], groups[chosen]
    crossed = intervals.crossed(rows, groups, limits.by)
    return pd.DataFrame() if crossed is None else intervals.coverage(limits, rows.assign(**crossed))


def _evaluated(run: RunFolder, chosen: Checkpoint, notices: list[str]) -> Evaluated | None:
    """The evaluation of this checkpoint; None, perhaps with a notice, if there is none, or it is not whole."""
    content = storage.read_if_exists(run.metrics.manifest_url)
    manifest = schemas.read_if_whole(MetricsManifest, run.metrics.manifest_url, "metrics_damaged")
    if content is None or manifest is None:
        return None
    if manifest.model_sha256 not in ("", chosen.model_sha256):
        notices.append(f"The evaluation in metrics/ is of {manifest.checkpoint}, another model, and is left out.")
        return None
    files = {entry.key: storage.read_if_exists(run.metrics.at(entry.key)) or b"" for entry in manifest.files}
    if any(storage.sha256(data) != manifest.sha256_of(key) for key, data in files.items()):
        notices.append("The evaluation in metrics/ is damaged or being replaced, and is left out.")
        return None
    rows = pd.read_parquet(io.BytesIO(files["predictions.parquet"])).astype({"sample_id": "str"})
    groups = pd.read_parquet(io.BytesIO(files["groups.parquet"]))
    summary = json.loads(files["summary.json"])
    return Evaluated(summary, groups, rows.set_index("sample_id"), storage.sha256(content))


def _ablation(run: RunFolder, chosen: Checkpoint, notices: list[str]) -> AblationRecord | None:
    found = schemas.read_if_whole(AblationRecord, run.at("metrics", ABLATION), "ablation_damaged")
    if found is not None and found.model_sha256 != chosen.model_sha256:
        notices.append(f"The ablation in metrics/ is of {found.checkpoint}, another model, and is left out.")
        return None
    return found


def _attempts(run: RunFolder) -> list[Attempt]:
    numbers = sorted(int(folder.name) for folder in run.ls("attempts") if folder.name.isdigit())
    return [
        Attempt(
            number,
            schemas.read_if_whole(AttemptStart, run.attempt(number).at(START), "attempt_damaged"),
            schemas.read_if_whole(AttemptEnd, run.attempt(number).at(EXIT), "attempt_damaged"),
        )
        for number in numbers
    ]


def _events(run: RunFolder) -> list[dict[str, str]]:
    """The events of the first attempt whose log was recorded; an attempt that was killed has no log."""
    for folder in run.ls("attempts"):
        content = storage.read_if_exists(folder.at(LOG))
        found = [_pairs(line) for line in (content or b"").decode(errors="replace").splitlines()]
        events = [pairs | {"file": f"attempts/{folder.name}/{LOG}"} for pairs in found if "event" in pairs]
        if any(one["event"] == "loaded" for one in events):
            return events
    return []


def _pairs(line: str) -> dict[str, str]:
    return {key: _value(value) for key, value in _PAIR.findall(line)}


def _value(text: str) -> str:
    try:
        return str(json.loads(text)) if text.startswith('"') else text
    except ValueError:
        return text
