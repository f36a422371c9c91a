"""`save_checkpoint` and `load_checkpoint` of `fusion.utils`: a model and its optimizer in one file at any URL.

They are for users' own training loops; the trainings of this package use `fusion.records.checkpoint`. Loading never
executes code: `torch.load(weights_only=True)` accepts only tensors and plain values, so nothing else can be saved.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
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
    """Writes the states of model, optimizer and scheduler, the epoch and the metrics into one file, atomically.

    NumPy scalars are saved as Python numbers; so are tensors and arrays in `epoch` and `metrics`, as numbers or lists.

    Args:
        path: a local path or an fsspec URL.

    Raises:
        TypeError: a state or the metrics hold something that `load_checkpoint` would refuse.
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
    """Loads what `save_checkpoint` wrote into the given objects, and returns the epoch and the metrics.

    Raises:
        DataError: the file does not exist, is damaged, holds other things than tensors and plain values, or was saved
            without the optimizer or scheduler that was given here.
    """
    try:
        state = _loaded(storage.read(str(path)))
    except (RuntimeError, EOFError, ValueError, OSError, UnpicklingError) as error:
        raise DataError(
            f"{path} is no checkpoint: {_reason(error)}",
            "give the path of a file that save_checkpoint wrote",
        ) from error
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
    """The cause in one line; torch's message about unsafe files has several lines, with terminal escape codes."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it holds {found[1]}, which could execute code" if found else str(error).splitlines()[0]


def _refuse(state: Mapping[str, Any]) -> None:
    """Raises a TypeError that names the part that `load_checkpoint` would refuse."""
    for name, part in state.items():
        try:
            _loaded(_saved(part))
        except UnpicklingError as error:
            raise TypeError(f"{name} can hold tensors and plain values only: {_reason(error)}") from error


def _plain(value: Any) -> Any:
    """Converts arrays, tensors and NumPy scalars in nested dicts, lists and tuples to Python's numbers and lists."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    return _converted(value, _plain)


def _with_plain_numbers(value: Any) -> Any:
    """As `_plain`, but converts NumPy scalars only: the tensors of an optimizer's state stay tensors."""
    return _converted(value, _with_plain_numbers)


def _converted(value: Any, inner: Callable[[Any], Any]) -> Any:
    """A NumPy scalar as a Python number; a dict, list or tuple with `inner` applied to its items; else the value."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {inner(key): inner(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(inner, value))
    return value
