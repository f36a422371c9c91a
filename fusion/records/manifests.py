"""Names of the files in a run or submission, and how a folder of them is committed and read.

The files of a folder are written first. Its `MANIFEST.json`, written last, lists each file with its size and sha256;
that commits the folder, which does not change afterwards. Readers ignore a folder without a manifest, and verify the
sha256 of every file that they read.
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
# Of a prepared source. Readers of folders of Parquet files, such as pyarrow and Spark, ignore names with "_".
SOURCE_MANIFEST: Final = "_MANIFEST.json"
MODEL: Final = "model.safetensors"
STATE: Final = "state.pt"
VALIDATION: Final = "validation.parquet"  # predictions of the best weights for the validation rows
INTERVALS: Final = "intervals.json"  # prediction intervals, see `fusion.records.intervals`
SUBMISSION: Final = "submission.csv"
PREDICTIONS: Final = "predictions.parquet"  # of a submission: price, bounds and comparable products of each row
FINGERPRINTS: Final = "fingerprints.parquet"  # of a submission's embeddings; the next night is compared with them
# These four lie in the folder of the run, which has no manifest. Every checkpoint's manifest has their sha256.
SPLIT: Final = "split.parquet"  # which rows train and which validate
MEMORY: Final = "memory.safetensors"  # the labelled rows that neighbours are looked up in
FEATURES: Final = "features.safetensors"  # what sources are computed from the tables with
BASELINES: Final = "baselines.json"  # what the run has to beat
# In metrics/. The manifest of the newest checkpoint has the sha256 of both.
LINES: Final = "train.jsonl"  # history of the training, one line per epoch
EPOCHS: Final = "epochs.csv"  # the same history as a table
ABLATION: Final = "ablation.json"  # in metrics/; no manifest lists it, but it contains a digest of itself
ENSEMBLE: Final = "ensemble.json"  # in the folder of an ensemble, which has it instead of checkpoints
PULLED: Final = "pulled.json"  # in a folder that jobs/pull.py has written: which files it did not fetch


_DIMS = TypeAdapter(dict[str, PositiveInt])


@dataclass(frozen=True, order=True)
class Folder:
    """A folder in a bucket, identified by its URL, which does not end with a slash."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return storage.base(self.url)

    @property
    def manifest_url(self) -> str:
        return self.at(MANIFEST)

    def at(self, *names: str) -> str:
        """URL of a file or folder in this folder: `run.at("metrics", "groups.csv")`."""
        return storage.join(self.url, *names)

    def ls(self, *names: str) -> list[Folder]:
        """The folders (and files) directly in this one, or in one below it, sorted by URL: `run.ls("checkpoints")`."""
        return [Folder(url) for url in storage.ls(self.at(*names))]

    def is_committed(self) -> bool:
        return storage.exists(self.manifest_url)


@dataclass(frozen=True)
class Checkpoint(Folder):
    """A committed checkpoint: its folder and its manifest."""

    manifest: CheckpointManifest

    @property
    def model_sha256(self) -> str:
        return self.manifest.sha256_of(MODEL)

    @property
    def smape(self) -> float:
        """Validation SMAPE of its weights; infinite before the first validation."""
        return float("inf") if self.manifest.smape is None else self.manifest.smape


def write_files(folder: Folder, files: Mapping[str, bytes]) -> list[FileEntry]:
    """Writes the files, and returns their entries for a manifest."""
    for name, data in files.items():
        storage.write(folder.at(name), data)
    return entries(files)


def entries(files: Mapping[str, bytes]) -> list[FileEntry]:
    """Entries of the files for a manifest: name, size and sha256."""
    return [FileEntry(name, len(data), storage.sha256(data)) for name, data in files.items()]


def best_of(found: Sequence[Checkpoint]) -> Checkpoint:
    """The checkpoint that predictions use: that of the end of the training, if the training has finished.

    Before that, it is the one with the lowest validation SMAPE, and of equal ones the newest. A finished checkpoint is
    preferred even to a lower SMAPE: when the learning rate follows a schedule to the end, an epoch before that is
    better only by chance.
    """

    def unfinished_then_smape(checkpoint: Checkpoint) -> tuple[bool, float]:
        return not checkpoint.manifest.finished, checkpoint.smape

    return min(reversed(found), key=unfinished_then_smape)


def dims_in(model: bytes) -> dict[str, int]:
    """The dimension of the embeddings of each role, from the header of a `model.safetensors`.

    Raises:
        ValueError: the header does not have them, or a dimension is not a positive number.
    """
    try:
        return _DIMS.validate_json(safetensors_metadata(model)["dims"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its metadata lack {error}") from error


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file, given its bytes; the library reads it only from local files.

    Raises:
        ValueError, KeyError, TypeError: the bytes have no such header.
    """
    length = int.from_bytes(content[:8], "little")  # the file starts with the length of its header, which is JSON
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def is_whole(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a file of the checkpoint is as it was written; if not, warns in the log."""
    try:
        read_file(checkpoint, name)
    except DataError as error:
        log.warning(event="checkpoint_damaged", checkpoint=checkpoint.url, reason=error.message)
        return False
    return True


def read_file(checkpoint: Checkpoint, name: str) -> bytes:
    """A file of the checkpoint, verified.

    Raises:
        DataError: the file does not exist, or its bytes are not those that were written.
    """
    data = storage.read(checkpoint.at(name))
    found, expected = storage.sha256(data), checkpoint.manifest.sha256_of(name)
    if found != expected:
        raise DataError(
            f"{checkpoint.url}/{name} is damaged: sha256 {found[:12]} of {len(data)} bytes, "
            f"its manifest says {expected[:12] or 'nothing about it'}",
            "start the training of this run again, which writes it again, or use another run",
        )
    return data
