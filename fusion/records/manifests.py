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
from fusion.records.schemas import CheckpointManifest, FileEntry

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


def best_of(found: Sequence[Checkpoint]) -> Checkpoint:
    """The one of the end of the training; before that, the one with the lowest validation SMAPE, the newest of equals.

    With a schedule to the end, the last weights are kept and not those of the luckiest epoch.
    """
    return min(reversed(found), key=lambda checkpoint: (not checkpoint.manifest.finished, checkpoint.smape))


def dims_in(model: bytes) -> dict[str, int]:
    """The dimension of every role, from the header of a `model.safetensors`.

    Raises:
        ValueError: there is no such header, or a dimension is not a positive number.
    """
    try:
        return _DIMS.validate_json(safetensors_metadata(model)["dims"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its metadata lack {error}") from error


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """The texts in the header of a safetensors file, which the library gives for files on a disk only.

    Raises:
        ValueError, KeyError, TypeError: there is no such header.
    """
    length = int.from_bytes(content[:8], "little")  # the file starts with the length of its header, which is JSON
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


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
