"""What is committed: immutable folders whose `MANIFEST.json`, written last, names every file with its hash.

A folder without one does not exist. Every reader of a file verifies its hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import PositiveInt, TypeAdapter

from fusion import log, storage
from fusion.errors import DataError
from fusion.records import schemas
from fusion.records.schemas import CheckpointManifest, EnsembleRecord, FileEntry, Manifest

MANIFEST: Final = "MANIFEST.json"
MODEL: Final = "model.safetensors"
STATE: Final = "state.pt"
VALIDATION: Final = "validation.parquet"  # what the best weights predict for the rows that validate
INTERVALS: Final = "intervals.json"  # between which prices a true price lies, given the predicted one
SUBMISSION: Final = "submission.csv"
PREDICTIONS: Final = "predictions.parquet"  # of a submission: what else the model says of each row
FINGERPRINTS: Final = "fingerprints.parquet"  # of a submission's embeddings, which the next night is compared with
MEMORY: Final = "memory.safetensors"  # the labelled rows that neighbours are taken from; as for the split
FEATURES: Final = "features.safetensors"  # what sources are computed with; as for the split
SPLIT: Final = "split.parquet"  # has no manifest of its own; every checkpoint's has its hash
LINES: Final = "train.jsonl"  # the history of the training, in metrics/: the newest checkpoint's manifest has its hash
EPOCHS: Final = "epochs.csv"  # the same as a table
ABLATION: Final = "ablation.json"  # in metrics/, sealed, in no manifest
ENSEMBLE: Final = "ensemble.json"  # in the folder of an ensemble, in the place of a run's checkpoints
PULLED: Final = "pulled.json"  # in a folder that jobs/pull.py has made: what it left out


_DIMS = TypeAdapter(dict[str, PositiveInt])


@dataclass(frozen=True)
class Checkpoint:
    """A committed, complete checkpoint: its folder and what its manifest says."""

    url: str
    manifest: CheckpointManifest

    @property
    def name(self) -> str:
        return storage.base(self.url)

    @property
    def run(self) -> str:
        """The folder of its run."""
        return self.url.rpartition("/checkpoints/")[0]

    @property
    def model_sha256(self) -> str:
        return self.manifest.sha256_of(MODEL)

    @property
    def smape(self) -> float:
        """Validation SMAPE of its weights; infinite before the first validation."""
        return float("inf") if self.manifest.smape is None else self.manifest.smape


def write_files(folder: str, files: Mapping[str, bytes]) -> list[FileEntry]:
    """Writes the files; what a manifest says of them."""
    for name, data in files.items():
        storage.write(storage.join(folder, name), data)
    return entries(files)


def entries(files: Mapping[str, bytes]) -> list[FileEntry]:
    """What a manifest says of the files."""
    return [FileEntry(name, len(data), storage.sha256(data)) for name, data in files.items()]


def committed(run: str) -> list[Checkpoint]:
    """All checkpoints of a run that have a manifest, oldest first; a damaged one is named in the log and left out."""
    found = [_checkpoint(folder) for folder in storage.ls(storage.join(run, "checkpoints"))]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _checkpoint(folder: str) -> Checkpoint | None:
    manifest = schemas.read_if_whole(CheckpointManifest, storage.join(folder, MANIFEST), "checkpoint_damaged")
    if manifest is None:
        return None
    if manifest.name != storage.base(folder):
        log.warning(event="checkpoint_damaged", checkpoint=folder, reason=f"its manifest is of {manifest.name}")
        return None
    return Checkpoint(folder, manifest)


def split_digest(run: str) -> str:
    """sha256 of a run's `split.parquet`; empty if it is gone: such a run compares with no other."""
    content = storage.read_if_exists(storage.join(run, SPLIT))
    return "" if content is None else storage.sha256(content)


def validated(run: str) -> list[Checkpoint]:
    """The committed checkpoints of a run whose validation SMAPE is known, oldest first."""
    return [checkpoint for checkpoint in committed(run) if checkpoint.manifest.smape is not None]


def best(run: str, named: str = "") -> Checkpoint:
    """The committed checkpoint with the lowest validation SMAPE, the newest of equals.

    Args:
        named: a checkpoint that was it when the run finished. If it still stands, there is no need to look at all.

    Raises:
        DataError: the run has none.
    """
    last = _checkpoint(storage.join(run, "checkpoints", named)) if named else None
    if last is not None and last.manifest.finished and last.manifest.smape is not None:
        return last
    found = validated(run)
    if not found:
        raise DataError(
            f"{run} has no committed checkpoint", "let its training finish, or name another run with --run-dir"
        )
    return best_of(found)


def best_of(found: Sequence[Checkpoint]) -> Checkpoint:
    """The one of the end of the training; before that, the one with the lowest validation SMAPE, the newest of equals.

    With a schedule to the end, the last weights are kept and not those of the luckiest epoch.
    """
    return min(reversed(found), key=lambda checkpoint: (not checkpoint.manifest.finished, checkpoint.smape))


def read_ensemble(folder: str) -> EnsembleRecord:
    """What the ensemble in this folder is made of, verified against its manifest.

    Raises:
        DataError: it is not committed, or damaged.
    """
    content = read_of_ensemble(folder, ENSEMBLE)
    if content is None:
        raise _damaged_ensemble(storage.join(folder, ENSEMBLE))
    return schemas.parse(EnsembleRecord, content, storage.join(folder, ENSEMBLE))


def read_of_ensemble(folder: str, name: str) -> bytes | None:
    """A file of an ensemble, verified; None if its manifest names none of that name.

    Raises:
        DataError: the ensemble is not committed, or the file is damaged.
    """
    url, manifest = storage.join(folder, name), schemas.read(Manifest, storage.join(folder, MANIFEST))
    if manifest is None:
        raise DataError(
            f"{folder} has no {MANIFEST}: this ensemble was not completed",
            "run the same `python -m fusion.ensemble` command again, which completes it",
        )
    if not manifest.sha256_of(name):
        return None
    content = storage.read(url)
    if storage.sha256(content) != manifest.sha256_of(name):
        raise _damaged_ensemble(url)
    return content


def _damaged_ensemble(url: str) -> DataError:
    return DataError(f"{url} is damaged: it is not what its manifest says", "make another ensemble of the same runs")


def dims_in(model: bytes) -> dict[str, int]:
    """The dimension of every role, from the header of a `model.safetensors`.

    Raises:
        ValueError: there is no such header, or a dimension is not a positive number.
    """
    length = int.from_bytes(model[:8], "little")  # safetensors: the header's length, then the header as JSON
    try:
        header = json.loads(model[8 : 8 + length])
        return _DIMS.validate_json(header["__metadata__"]["dims"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its metadata lack {error}") from error


def is_whole(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a file of the checkpoint is as it was written; one that is not is named in the log."""
    try:
        read_file(checkpoint, name)
    except DataError as error:
        log.warning(event="checkpoint_damaged", checkpoint=checkpoint.url, reason=error.message)
        return False
    return True


def read_file(checkpoint: Checkpoint, name: str) -> bytes:
    """A file of the checkpoint, verified.

    Raises:
        DataError: its bytes are not those that were written.
    """
    data = storage.read(storage.join(checkpoint.url, name))
    if storage.sha256(data) != checkpoint.manifest.sha256_of(name):
        raise DataError(
            f"{checkpoint.url}/{name} is damaged: sha256 {storage.sha256(data)[:12]} of {len(data)} bytes, "
            f"its manifest says {checkpoint.manifest.sha256_of(name)[:12] or 'nothing of it'}",
            "start the training of this run again, which writes it again, or use another run",
        )
    return data
