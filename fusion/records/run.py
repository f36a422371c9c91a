"""The folder of a run in a bucket: the path of each file, and methods that read them.

    runs/<run id>/
        config.json               its settings, written first
        run.json                  what it was made from: digests of data and code, dimensions, versions
        lease.json                the newest attempt, which alone may write
        attempts/<n>/             start.json, exit.json and log.txt of each attempt
        split.parquet             which rows trained and which validate
        memory.safetensors        the labelled rows that the model looks up neighbours in
        features.safetensors      how sources are computed from the tables
        baselines.json            the scores of simpler methods on the same validation rows
        checkpoints/step-<n>/     weights, training state, validation predictions; committed by MANIFEST.json
        report.html               all of this for people, see `fusion.report`
        model_card.md             a part of it, with the metadata that registries of models read
        metrics/                  the history of the training, an evaluation by groups, an ablation
        tensorboard/              with --tensorboard, an event file per epoch
        parts/                    chunks of an evaluation or an ablation that has not finished

An ensemble has a folder in `runs/` too, with `ensemble.json` and `MANIFEST.json` instead of settings and checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from fusion import log, storage
from fusion.config import HOW, RunConfig, digest
from fusion.errors import DataError
from fusion.records import schemas
from fusion.records.manifests import BASELINES, ENSEMBLE, LINES, MANIFEST, SPLIT, Checkpoint, Folder, best_of
from fusion.records.schemas import (
    AttemptEnd,
    AttemptStart,
    Baselines,
    CheckpointManifest,
    EnsembleRecord,
    Manifest,
    RunFacts,
)

CONFIG: Final = "config.json"
FACTS: Final = "run.json"
LEASE: Final = "lease.json"
START: Final = "start.json"
EXIT: Final = "exit.json"
LOG: Final = "log.txt"
REPORT: Final = "report.html"
CARD: Final = "model_card.md"

# The line that a training logs at its start, from which `RunFolder.n_parameters` reads the size of the model.
_PARAMETERS = re.compile(r"\bevent=start\b.*\bparameters=(\d+)")


class RunFolder(Folder):
    """A run or ensemble, identified by the URL of its folder.

    The object holds nothing but the URL: each method reads the bucket. Unless a method says otherwise, it returns None
    for a document that does not exist, and raises `DataError` for a damaged one.
    """

    @classmethod
    def named(cls, output: str, run_id: str) -> RunFolder:
        return cls(storage.join(output, "runs", run_id))

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """The folder of the run that these settings start."""
        return cls.named(config.output, config.name())

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> RunFolder:
        return cls(checkpoint.url.rpartition("/checkpoints/")[0])

    @property
    def output(self) -> str:
        """URL of the output that this run is in; empty for a copy elsewhere."""
        return self.url.rpartition("/runs/")[0]

    @property
    def is_in_runs(self) -> bool:
        """Whether the folder lies in one that is named `runs`; a copy elsewhere may have another name than the run."""
        return self.url.split("/")[-2:-1] == ["runs"]

    @property
    def run_id(self) -> str:
        return self.name

    @property
    def metrics(self) -> Folder:
        return Folder(self.at("metrics"))

    @property
    def parts(self) -> str:
        return self.at("parts")

    @property
    def tensorboard(self) -> str:
        return self.at("tensorboard")

    def segment(self, epoch: int) -> str:
        """The file with what TensorBoard shows of an epoch, numbered from 1."""
        return self.at("tensorboard", f"events.out.tfevents.{epoch:08d}.fusion")

    @property
    def report_url(self) -> str:
        return self.at(REPORT)

    def checkpoint(self, name: str) -> Folder:
        return Folder(self.at("checkpoints", name))

    def attempt(self, number: int) -> Folder:
        return Folder(self.at("attempts", str(number)))

    def exists(self) -> bool:
        """Whether the folder holds a run or an ensemble."""
        return any(storage.exists(self.at(name)) for name in (CONFIG, ENSEMBLE))

    def facts(self) -> RunFacts | None:
        """Content of `run.json`; None for a run that has not read its data yet."""
        return schemas.read(RunFacts, self.at(FACTS))

    def facts_if_whole(self) -> RunFacts | None:
        """As `facts`, but a damaged document gives None too, with a warning in the log."""
        return schemas.read_if_whole(RunFacts, self.at(FACTS), "run_damaged")

    def baselines(self) -> Baselines | None:
        """What the run has to beat; None for runs of earlier versions, and for those that could not compute it."""
        return schemas.read(Baselines, self.at(BASELINES))

    def history(self) -> list[dict[str, Any]]:
        """The epochs of the training, as its newest checkpoint has left them: epoch, step, loss, smape, lr, seconds."""
        url = self.metrics.at(LINES)
        try:
            entries = [json.loads(line) for line in (storage.read_if_exists(url) or b"").splitlines()]
            return [{"epoch": int(entry["epoch"]), **entry, "smape": float(entry["smape"])} for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(url, str(error)) from error

    def settings(self) -> dict[str, Any]:
        """The settings in `config.json`, with sections as dotted keys such as `sources.clip_image`.

        Raises:
            DataError: the file does not exist, or is damaged.
        """
        url = self.at(CONFIG)
        try:
            values = json.loads(storage.read(url))
        except ValueError as error:
            raise damaged(url, str(error)) from error
        if not isinstance(values, dict):
            raise damaged(url, f"expected an object with settings, found {values!r:.80}")
        return dict(flat(values))

    def variant(self) -> str:
        """The variant, from `run.json`; empty for a run that never read its data."""
        facts = self.facts()
        return facts.variant if facts else ""

    def read_as_trained(self, name: str, sha256: str) -> bytes:
        """The bytes of a file that is written before the first step, such as `split.parquet`.

        Args:
            sha256: of the file that the run was trained with, from the manifest of a checkpoint; empty if unknown.

        Raises:
            DataError: the file does not exist, or is not the one that the run was trained with.
        """
        url = self.at(name)
        content = storage.read(url)
        if sha256 not in ("", storage.sha256(content)):
            raise DataError(
                f"{url} is not the one that the run was trained with", "restore it, or train under another --run-id"
            )
        return content

    def checkpoints(self) -> list[Checkpoint]:
        """All committed checkpoints, oldest first; those with a damaged manifest are left out, with a warning."""
        found = [checkpoint_in(folder) for folder in self.ls("checkpoints")]
        return [checkpoint for checkpoint in found if checkpoint is not None]

    def validated(self) -> list[Checkpoint]:
        """The checkpoints whose validation SMAPE is known, oldest first."""
        return [checkpoint for checkpoint in self.checkpoints() if checkpoint.manifest.smape is not None]

    def best(self, named: str = "") -> Checkpoint:
        """The checkpoint that evaluations and predictions use, see `manifests.best_of`.

        Args:
            named: name of the checkpoint that was the best when the run finished. If it still exists, no other
                checkpoint is read, which saves requests.

        Raises:
            DataError: the run has no checkpoint that was validated.
        """
        last = checkpoint_in(self.checkpoint(named)) if named else None
        if last is not None and last.manifest.finished and last.manifest.smape is not None:
            return last
        found = self.validated()
        if not found:
            raise DataError(
                f"{self} has no committed checkpoint", "let its training finish, or name another run with --run-dir"
            )
        return best_of(found)

    def split_digest(self) -> str:
        """sha256 of `split.parquet`; empty if the file does not exist, so that the run is comparable with no other."""
        content = storage.read_if_exists(self.at(SPLIT))
        return "" if content is None else storage.sha256(content)

    def ensemble(self) -> EnsembleRecord:
        """The ensemble in this folder: its members and their weights, verified against its manifest.

        Raises:
            DataError: the ensemble is not committed, or `ensemble.json` is damaged.
        """
        content = self.ensemble_file(ENSEMBLE)
        if content is None:
            raise _damaged_ensemble(self.at(ENSEMBLE))
        return schemas.parse(EnsembleRecord, content, self.at(ENSEMBLE))

    def ensemble_file(self, name: str) -> bytes | None:
        """Bytes of a file of the ensemble in this folder, verified; None if its manifest does not list the file.

        Raises:
            DataError: the ensemble is not committed, or the file is damaged.
        """
        url, manifest = self.at(name), schemas.read(Manifest, self.manifest_url)
        if manifest is None:
            raise DataError(
                f"{self} has no {MANIFEST}: this ensemble was not completed",
                "run the same `python -m fusion.ensemble` command again, which completes it",
            )
        if not manifest.sha256_of(name):
            return None
        content = storage.read(url)
        if storage.sha256(content) != manifest.sha256_of(name):
            raise _damaged_ensemble(url)
        return content

    def n_parameters(self) -> int | None:
        """Number of the model's parameters, read from the log of the training; None if no log has it."""
        for attempt in self.ls("attempts"):
            content = storage.read_if_exists(attempt.at(LOG))
            found = _PARAMETERS.search(content.decode(errors="replace")) if content else None
            if found:
                return int(found[1])
        return None

    def minutes(self) -> float | None:
        """Minutes that all attempts took together; None if none has ended.

        Attempts that were killed are not counted, because they did not record their end.
        """
        minutes = [_minutes(attempt) for attempt in self.ls("attempts")]
        known = [one for one in minutes if one is not None]
        return sum(known) if known else None


def config_digest(settings: Mapping[str, Any]) -> str:
    """sha256 of the settings that decide what a run computes.

    Settings that only decide how it is computed (`HOW`, such as the device) do not count, nor does the
    URL of the data, which may be moved.
    """
    return digest({key: value for key, value in settings.items() if key not in HOW | {"data"}})


def differing(settings: Sequence[Mapping[str, Any]], without: set[str]) -> dict[str, list[Any]]:
    """Settings that differ between runs, each with one value per run.

    Args:
        settings: of each run, as `RunFolder.settings` returns them. A variant that lacks a setting has None for it.
        without: keys to leave out.
    """
    keys = dict.fromkeys(key for one in settings for key in one if key not in without)
    found = {key: [one.get(key) for one in settings] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def damaged(url: str, cause: str) -> DataError:
    """The error for a damaged document of a run."""
    return DataError(
        f"{url} is damaged: {cause}", "compare other runs; `python -m fusion.verify URL` says what else is"
    )


def _damaged_ensemble(url: str) -> DataError:
    return DataError(
        f"{url} is damaged: its sha256 is not the one in its manifest", "make another ensemble of the same runs"
    )


def checkpoint_in(folder: Folder) -> Checkpoint | None:
    """The checkpoint in a folder; None, with a warning if its manifest is damaged, if it is not committed."""
    manifest = schemas.read_if_whole(CheckpointManifest, folder.manifest_url, "checkpoint_damaged")
    if manifest is None:
        return None
    if manifest.name != folder.name:
        log.warning(event="checkpoint_damaged", checkpoint=folder, reason=f"its manifest is of {manifest.name}")
        return None
    return Checkpoint(folder.url, manifest)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of all sections, each with a dotted key such as `sources.clip_image`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _minutes(attempt: Folder) -> float | None:
    """Minutes between the start and the end of an attempt; None if one of them was not recorded."""
    start = schemas.read_if_whole(AttemptStart, attempt.at(START), "attempt_damaged")
    end = schemas.read_if_whole(AttemptEnd, attempt.at(EXIT), "attempt_damaged")
    if start is None or end is None:
        return None
    began, ended = (datetime.fromisoformat(one) for one in (start.started, end.ended))
    return (ended - began).total_seconds() / 60
