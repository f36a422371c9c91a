"""Out-of-fold predictions: reads what runs predicted for their validation rows, and finds the rows that runs share."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fusion import storage
from fusion.compare.standard_errors import IntArray, joined_groups
from fusion.config import HOW
from fusion.errors import DataError, UsageError
from fusion.records import manifests
from fusion.records.find_run import no_run
from fusion.records.manifests import ENSEMBLE, SUBMISSION, VALIDATION
from fusion.records.output import OutputFolder
from fusion.records.run import RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT, MetricsManifest, read_if_whole
from fusion.records.split import read_split
from fusion.records.validation import has_validation, validation_of

# Settings in which the fold runs of one recipe may differ.
OF_FOLD = {"fold", *HOW}


@dataclass(frozen=True)
class Member:
    """A run with its best checkpoint, or an ensemble.

    Attributes:
        checkpoint: name of the best checkpoint.
        finished: whether the training has ended; True for an ensemble.
        settings: as of `RunFolder.settings`; empty for an ensemble.
    """

    run: RunFolder
    variant: str
    checkpoint: str
    model_sha256: str
    data_sha256: str
    finished: bool
    settings: dict[str, Any]

    @property
    def run_id(self) -> str:
        return self.run.run_id


@dataclass(frozen=True)
class Scored:
    """A run, or the fold runs of one recipe together, with predictions of the validation rows.

    Attributes:
        members: the run, or the fold runs.
        rows: a row per validation row, with sample_id as the sorted index. Columns: price and predicted in dollars,
            group, and, if the run has them, spread and category.
    """

    members: tuple[Member, ...]
    rows: pd.DataFrame

    @property
    def name(self) -> str:
        first = self.members[0].run_id
        return first if len(self.members) == 1 else f"{first} ({len(self.members)} folds)"


def scored_runs(runs: Sequence[str], output: str) -> list[Scored]:
    """Reads the runs that a user names; the fold runs of one recipe are joined into one.

    Raises:
        UsageError: there are fewer than two runs, or one is named twice.
        DataError: as `find_run` and `scored`.
    """
    folders = [find_run(output, which) for which in runs]
    repeated = [which for which, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1]
    if repeated:
        raise UsageError(f"{repeated[0]} is named {len(repeated)} times", "name each run once")
    if len(runs) < 2:
        hint = f"`python jobs/pull.py runs --output {output}` lists them"
        raise UsageError(f"got {' '.join(runs)}, expected at least two runs", hint)
    return stacked([scored(folder) for folder in folders])


def find_run(output: str, which: str) -> RunFolder:
    """Returns the folder of a run, which is given by its id or by the URL of its folder.

    Raises:
        DataError: there is no such run, or it is a submission.
    """
    run = RunFolder(which.rstrip("/")) if "/" in which else RunFolder.named(output, which)
    if run.exists():
        return run
    if storage.exists(run.at(SUBMISSION)) or OutputFolder(output).ls("submissions", which):
        hint = f"`python jobs/pull.py submissions --output {output}` lists the run that made each submission"
        raise DataError(f"{which} is a submission, not a run", hint)
    if "/" in which:
        raise DataError(f"{run} has no config.json: it is not the folder of a run", "name a run by its id or folder")
    raise no_run(output, which)


def scored(run: RunFolder) -> Scored:
    """Reads a run, or an ensemble, with the predictions of its best checkpoint for its validation rows.

    Raises:
        DataError: the run has no validated checkpoint, or its predictions are missing or damaged.
    """
    if storage.exists(run.at(ENSEMBLE)):
        return _ensemble(run)
    found, variant = run.validated(), run.variant()
    if not found:
        raise DataError(
            f"run {run.run_id} has no validated checkpoint yet",
            "let its training finish, or leave this run out",
        )
    chosen = manifests.best_of(found)
    rows = validation_of(chosen) if has_validation(chosen) else _evaluated(run, chosen, variant)
    split = read_split(run, chosen.manifest.split_sha256).set_index("sample_id")
    rows = rows.set_index("sample_id").sort_index()
    rows = rows[[name for name in ("price", "predicted", "spread", "category") if name in rows]]
    rows["group"] = split["group"].reindex(rows.index).to_numpy()
    made = chosen.manifest
    member = Member(run, variant, chosen.name, chosen.model_sha256, made.data_sha256, made.finished, run.settings())
    return Scored((member,), rows)


def _ensemble(folder: RunFolder) -> Scored:
    record, content = folder.ensemble(), folder.ensemble_file(VALIDATION)
    rows = pd.read_parquet(io.BytesIO(content or b"")).astype({"sample_id": "str"}).set_index("sample_id")
    member = Member(folder, ENSEMBLE_VARIANT, ENSEMBLE, record.model_sha256(), "", True, {})
    return Scored((member,), rows)


def _evaluated(run: RunFolder, chosen: manifests.Checkpoint, variant: str) -> pd.DataFrame:
    """Reads the predictions that an evaluation wrote, for a run whose checkpoints do not contain predictions.

    Earlier versions trained such runs.

    Raises:
        DataError: this checkpoint was not evaluated, or not on the data of its training, or a file is damaged.
    """
    manifest = read_if_whole(MetricsManifest, run.metrics.manifest_url, "metrics_damaged")
    if manifest is not None and manifest.model_sha256 == chosen.model_sha256:
        files = {key: storage.read(run.at("metrics", key)) for key in ("predictions.parquet", "summary.json")}
        is_whole = all(storage.sha256(data) == manifest.sha256_of(key) for key, data in files.items())
        if is_whole and json.loads(files["summary.json"]).get("as_trained") is not False:
            return pd.read_parquet(io.BytesIO(files["predictions.parquet"])).astype({"sample_id": "str"})
    raise DataError(
        f"an earlier version trained run {run.run_id}, and did not save its predictions of the validation rows",
        "evaluate it first: "
        f"`python -m fusion.{variant}.evaluate_by_groups --output {run.output} --run-id {run.run_id}`",
    )


def stacked(found: Sequence[Scored]) -> list[Scored]:
    """Joins the fold runs of one recipe into one entry, in which each row is predicted by the run that held it out.

    Raises:
        DataError: two of the runs are of the same fold of one recipe.
    """
    recipes: dict[str, list[Scored]] = {}
    for one in found:
        recipes.setdefault(_recipe(one), []).append(one)
    return [_joined(recipe) for recipe in recipes.values()]


def _recipe(one: Scored) -> str:
    """Returns a key that is equal for fold runs of one recipe, and different for any other runs."""
    (member,) = one.members
    # Without --fold, a run with --folds trains all folds, and so is complete by itself.
    if member.settings.get("folds") is None or member.settings.get("fold") is None:
        return member.run.url
    settings = {key: value for key, value in member.settings.items() if key not in OF_FOLD}
    return json.dumps([member.variant, member.data_sha256, settings], sort_keys=True)


def _joined(folds: list[Scored]) -> Scored:
    """Joins fold runs of one recipe. Raises DataError if two of them are of the same fold."""
    if len(folds) == 1:
        return folds[0]
    folds = sorted(folds, key=lambda one: int(one.members[0].settings["fold"]))
    rows = pd.concat([one.rows for one in folds]).sort_index()
    members = tuple(member for one in folds for member in one.members)
    if rows.index.has_duplicates:
        ids = [member.run_id for member in members]
        raise DataError(
            f"two of the runs {', '.join(ids)} are of the same fold of one recipe", "leave out one of the two"
        )
    return Scored(members, rows)


@dataclass(frozen=True)
class Shared:
    """The n rows that R runs all validated on, with the same prices.

    Attributes:
        prices: [n] dollars.
        predicted: [R, n] dollars, the predictions of each run.
        groups: [n] groups of near-duplicates. Rows that are in one group in any of the runs are in one group here.
        category: [n] text; None if the runs have no category, or not the same.
    """

    ids: pd.Index
    prices: np.ndarray
    predicted: np.ndarray
    groups: IntArray
    category: pd.Series | None = None

    def __len__(self) -> int:
        return len(self.ids)


def shared(found: Sequence[Scored]) -> Shared:
    """Returns the rows that all runs validated on with the same prices; there may be no such rows."""
    ids = found[0].rows.index
    for other in found[1:]:
        ids = ids.intersection(other.rows.index)
    parts = [one.rows.loc[ids] for one in found]
    prices = np.stack([part["price"].to_numpy(np.float64) for part in parts])
    is_same = (prices == prices[0]).all(axis=0)
    predicted = np.stack([part["predicted"].to_numpy(np.float64) for part in parts])
    groups = joined_groups([part["group"].to_numpy(np.int64)[is_same] for part in parts])
    return Shared(ids[is_same], prices[0, is_same], predicted[:, is_same], groups, _category(found, ids[is_same]))


def _category(found: Sequence[Scored], ids: pd.Index) -> pd.Series | None:
    if any("category" not in one.rows for one in found):
        return None
    columns = [one.rows.loc[ids, "category"] for one in found]
    return columns[0] if all(column.equals(columns[0]) for column in columns) else None


def same_rows(one: Scored, other: Scored) -> bool:
    """Whether both runs validated on the same rows, with the same prices."""
    prices = (one.rows["price"], other.rows["price"])
    return one.rows.index.equals(other.rows.index) and bool((prices[0].to_numpy() == prices[1].to_numpy()).all())
