"""What a run must remember: immutable folders of weights and training state, a manifest of hashes written last.

A folder without `MANIFEST.json` does not exist. Whoever reads one verifies every hash. Weights are safetensors; nothing
here is ever unpickled but tensors and plain values.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fusion import log, storage
from fusion.errors import DataError

MODEL, STATE, MANIFEST = "model.safetensors", "state.pt", "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed, complete checkpoint: its folder and what its manifest says."""

    url: str
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def commit(
    run: str, step: int, tensors: Mapping[str, Tensor], dims: Mapping[str, int], state: object, facts: Mapping[str, Any]
) -> Checkpoint:
    """Writes `checkpoints/step-…` of a run; it exists from the moment its manifest is written.

    Args:
        tensors: the model's state dict.
        dims: role to dimension; stored in the weights' file, so that it can be used alone.
        state: what training needs to go on; tensors and plain values.
        facts: what else the manifest says, such as the validation SMAPE.
    """
    folder = storage.join(run, "checkpoints", f"step-{step:08d}")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files = {
        MODEL: safetensors.torch.save(contiguous, {"dims": json.dumps(dict(dims))}),
        STATE: _torch_bytes(state),
    }
    manifest = {"schema": 1, "step": step, **facts, "files": write_files(folder, files)}
    storage.write(storage.join(folder, MANIFEST), (json.dumps(manifest, indent=2) + "\n").encode())
    return Checkpoint(folder, manifest)


def write_files(folder: str, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Writes the files; what a manifest says of them."""
    for name, data in files.items():
        storage.write(storage.join(folder, name), data)
    return [{"key": name, "bytes": len(data), "sha256": storage.sha256(data)} for name, data in files.items()]


def committed(run: str) -> list[Checkpoint]:
    """All checkpoints of a run that have a manifest, oldest first."""
    found = []
    for folder in storage.ls(storage.join(run, "checkpoints")):
        url = storage.join(folder, MANIFEST)
        if storage.exists(url):
            found.append(Checkpoint(folder, json.loads(storage.read(url))))
    return found


def best(run: str) -> Checkpoint:
    """The committed checkpoint with the lowest validation SMAPE.

    Raises:
        DataError: the run has none.
    """
    found = committed(run)
    if not found:
        raise DataError(f"{run} has no committed checkpoint", "let its training finish, or name another with --run-dir")
    return min(found, key=lambda checkpoint: float(checkpoint.manifest["smape"]))


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


def read_model(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights and the dimension of every role."""
    data = read_file(checkpoint, MODEL)
    length = int.from_bytes(data[:8], "little")  # safetensors: the header's length, then the header as JSON
    header = json.loads(data[8 : 8 + length])
    log.info(event="model", checkpoint=checkpoint.url, smape=checkpoint.manifest["smape"])
    return safetensors.torch.load(data), json.loads(header["__metadata__"]["dims"])


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    epoch: int,
    metrics: Mapping[str, float],
    path: str,
) -> None:
    """Writes everything into one object at any URL, atomically."""
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    storage.write(str(path), _torch_bytes(state | {"epoch": epoch, "metrics": dict(metrics)}))


def load_checkpoint(
    path: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> tuple[int, dict[str, float]]:
    """Restores what `save_checkpoint` wrote; the epoch and the metrics it was given.

    Raises:
        DataError: it does not exist, is damaged, holds more than tensors and plain values, or lacks a part asked for.
    """
    try:
        state = torch.load(io.BytesIO(storage.read(str(path))), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, UnpicklingError) as error:
        raise DataError(f"{path} is no checkpoint: {str(error).splitlines()[0]}", "use another file") from error
    for name, part in {"model": model, "optimizer": optimizer, "scheduler": scheduler}.items():
        if part is None:
            continue
        if name not in state:
            raise DataError(f"{path} was saved without {name}", f"load it without {name}")
        part.load_state_dict(state[name])
    return state["epoch"], state["metrics"]


def _torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
