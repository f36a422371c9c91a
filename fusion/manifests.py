"""What is committed: immutable folders whose `MANIFEST.json`, written last, names every file with its hash.

A folder without one does not exist. Whoever reads a file verifies its hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fusion import log, records, storage
from fusion.errors import DataError

MANIFEST: Final = "MANIFEST.json"
MODEL: Final = "model.safetensors"
STATE: Final = "state.pt"
SUBMISSION: Final = "submission.csv"


@dataclass(frozen=True)
class Checkpoint:
    """A committed, complete checkpoint: its folder and what its manifest says."""

    url: str
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return storage.base(self.url)

    @property
    def model_sha256(self) -> str:
        return str(next(entry["sha256"] for entry in self.manifest["files"] if entry["key"] == MODEL))

    @property
    def smape(self) -> float:
        """Validation SMAPE of its weights; infinite before the first validation."""
        return float("inf") if self.manifest["smape"] is None else float(self.manifest["smape"])


def write_files(folder: str, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Writes the files; what a manifest says of them."""
    for name, data in files.items():
        storage.write(storage.join(folder, name), data)
    return entries(files)


def entries(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """What a manifest says of the files: key, bytes, sha256."""
    return [{"key": name, "bytes": len(data), "sha256": storage.sha256(data)} for name, data in files.items()]


def committed(run: str) -> list[Checkpoint]:
    """All checkpoints of a run that have a manifest, oldest first; a damaged one is named in the log and left out."""
    found = []
    for folder in storage.ls(storage.join(run, "checkpoints")):
        url = storage.join(folder, MANIFEST)
        held = storage.read_version(url)
        if held is None:
            continue
        try:
            records.parse(records.CheckpointManifest, held[0], url)
        except DataError as error:
            log.warning(event="checkpoint_damaged", checkpoint=folder, reason=error.message)
            continue
        found.append(Checkpoint(folder, json.loads(held[0])))
    return found


def validated(run: str) -> list[Checkpoint]:
    """The committed checkpoints of a run whose validation SMAPE is known, oldest first."""
    return [checkpoint for checkpoint in committed(run) if checkpoint.manifest["smape"] is not None]


def best(run: str) -> Checkpoint:
    """The committed checkpoint with the lowest validation SMAPE, the newest of equals.

    Raises:
        DataError: the run has none.
    """
    found = validated(run)
    if not found:
        raise DataError(f"{run} has no committed checkpoint", "let its training finish, or name another with --run-dir")
    return best_of(found)


def best_of(found: Sequence[Checkpoint]) -> Checkpoint:
    """The one with the lowest validation SMAPE, the newest of equals."""
    return min(reversed(found), key=lambda checkpoint: checkpoint.smape)


def read_file(checkpoint: Checkpoint, name: str) -> bytes:
    """A file of the checkpoint, verified.

    Raises:
        DataError: its bytes are not those that were written.
    """
    data = storage.read(storage.join(checkpoint.url, name))
    expected = next(entry for entry in checkpoint.manifest["files"] if entry["key"] == name)
    if storage.sha256(data) != expected["sha256"]:
        raise DataError(
            f"{checkpoint.url}/{name} is damaged: sha256 {storage.sha256(data)[:12]} of {len(data)} bytes, "
            f"its manifest says {expected['sha256'][:12]} of {expected['bytes']}",
            "use another checkpoint, or train again",
        )
    return data
