"""`save_checkpoint` and `load_checkpoint` of `fusion.utils`: a model with its optimizer in one object at any URL.

A training has checkpoints of its own (`fusion.records.checkpoint`); these are for code that users write. Loading
executes
nothing: `torch.load(weights_only=True)` takes tensors and plain values, and so nothing else is saved.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion import storage
from fusion.errors import DataError


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    epoch: int,
    metrics: Mapping[str, float],
    path: str,
) -> None:
    """Writes everything into one object at any URL, atomically.

    Numbers of NumPy, and tensors and arrays in `epoch` and `metrics`, are saved as plain numbers and lists.

    Raises:
        TypeError: a part holds something that `load_checkpoint` would refuse.
    """
    state: dict[str, Any] = {"model": model.state_dict()}
    for name, part in {"optimizer": optimizer, "scheduler": scheduler}.items():
        if part is not None:
            state[name] = _with_plain_numbers(part.state_dict())
    state |= {"epoch": _plain(epoch), "metrics": _plain(dict(metrics))}
    data = _saved(state)
    try:
        _loaded(data)
    except UnpicklingError:
        _refuse(state)
    storage.write(str(path), data)


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
        state = _loaded(storage.read(str(path)))
    except (RuntimeError, EOFError, ValueError, OSError, UnpicklingError) as error:
        raise DataError(f"{path} is no checkpoint: {_reason(error)}", "use another file") from error
    for name, part in {"model": model, "optimizer": optimizer, "scheduler": scheduler}.items():
        if part is None:
            continue
        if name not in state:
            raise DataError(f"{path} was saved without {name}", f"load it without {name}")
        part.load_state_dict(state[name])
    return state["epoch"], state["metrics"]


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """The cause in one line; torch's text about unsafe files has several, with escape codes."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it holds {found[1]}, which could execute code" if found else str(error).splitlines()[0]


def _refuse(state: Mapping[str, Any]) -> None:
    """Names the part that cannot be loaded."""
    for name, part in state.items():
        try:
            _loaded(_saved(part))
        except UnpicklingError as error:
            raise TypeError(f"{name} can hold tensors and plain values only: {_reason(error)}") from error


def _plain(value: Any) -> Any:
    """Arrays, tensors and numbers of NumPy as Python's, through dicts, lists and tuples; all else as it is."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    return _converted(value, _plain)


def _with_plain_numbers(value: Any) -> Any:
    """The same for numbers of NumPy only: the tensors of an optimizer stay what they are."""
    return _converted(value, _with_plain_numbers)


def _converted(value: Any, inner: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {inner(key): inner(each) for key, each in value.items()}
    return type(value)(map(inner, value)) if type(value) in (list, tuple) else value
