"""The memory of a run: the labelled rows that its model looks up neighbours in, written once before the first step.

`memory.safetensors` holds, for each row, its key (the vector that rows are compared by, in half precision), price, id,
fold and group of near-duplicates. It also holds the principal components that keys are computed with, so that a
resumed training computes exactly the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import safetensors
import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import Tensor

from fusion.errors import DataError
from fusion.nn.approximate import Partition, fits
from fusion.nn.neighbours import Memory, bands_of
from fusion.records.manifests import MEMORY, safetensors_metadata
from fusion.records.run import RunFolder

_COMPONENTS = "components."
_ROWS = {"keys": np.float16, "folds": np.int64, "groups": np.int64}
_PARTITION = {"centroids": np.float32, "lists": np.int32, "codebook": np.float32}


@dataclass(frozen=True)
class Remembered:
    """The content of `memory.safetensors`.

    Attributes:
        ids: [N] sample ids, str.
        prices: [N] dollars, float64.
        memory: keys, log prices, folds and groups of these rows, in the same order.
        components: role to [D_role, P_role] float32, the principal components that keys are computed with.
        weights: [S] float32, the weight of each band of components when candidate neighbours are searched.
    """

    ids: pd.Index
    prices: np.ndarray
    memory: Memory
    components: dict[str, np.ndarray]
    weights: np.ndarray


def log_prices_of(prices: np.ndarray) -> Tensor:
    """[N] float32: natural logarithms of the prices [N] in dollars."""
    return torch.from_numpy(np.log(prices.astype(np.float64, copy=False)).astype(np.float32))


def to_bytes(remembered: Remembered) -> bytes:
    """The content of the file, as safetensors. The same rows always give the same bytes."""
    memory, text = remembered.memory, "\0".join(remembered.ids).encode()
    arrays = {name: getattr(memory, name).cpu().numpy() for name in _ROWS}
    arrays |= {"ids": np.frombuffer(text, np.uint8), "prices": remembered.prices, "weights": remembered.weights}
    arrays |= {f"{_COMPONENTS}{role}": values for role, values in remembered.components.items()}
    if memory.partition is not None:
        arrays |= {f"partition.{name}": getattr(memory.partition, name).numpy() for name in _PARTITION}
    # safetensors saves the memory of an array without regard to its strides, so that each has to be contiguous.
    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    return safetensors.numpy.save(arrays, {"roles": json.dumps(list(remembered.components))})


def from_bytes(data: bytes, name: str) -> Remembered:
    """Reads what `to_bytes` wrote.

    Args:
        name: URL of the file, for the error message.

    Raises:
        DataError: the file is damaged.
    """
    try:
        arrays = safetensors.numpy.load(data)
        roles = json.loads(safetensors_metadata(data)["roles"])
        components = {role: arrays[f"{_COMPONENTS}{role}"] for role in roles}
        ids = pd.Index(arrays["ids"].tobytes().decode().split("\0"), dtype="str")
        rows = {key: torch.from_numpy(arrays[key].astype(kind, copy=False)) for key, kind in _ROWS.items()}
        log_prices = log_prices_of(arrays["prices"])
        bands = bands_of({role: values.shape[1] for role, values in components.items()})
        memory = Memory(rows["keys"], log_prices, rows["folds"], rows["groups"], bands, _partition(arrays))
        found = Remembered(ids, arrays["prices"], memory, components, arrays["weights"])
        _check(found)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        remedy = "`python -m fusion.verify URL` says what else is damaged; restore it, or train under another --run-id"
        raise DataError(f"{name} is damaged: {' '.join(str(error).split())[:200]}", remedy) from error
    return found


def _partition(arrays: Mapping[str, np.ndarray]) -> Partition | None:
    names = {name: f"partition.{name}" for name in _PARTITION}
    if not any(name in arrays for name in names.values()):
        return None  # there are too few rows for an approximate search, or an earlier version wrote the file
    return Partition(**{key: torch.from_numpy(arrays[names[key]].astype(_PARTITION[key], copy=False)) for key in names})


def _check(found: Remembered) -> None:
    """Raises ValueError if the arrays do not fit each other, or hold numbers that are not finite."""
    memory, n_rows = found.memory, len(found.ids)
    lengths = {len(found.prices), *(len(getattr(memory, name)) for name in _ROWS)}
    if lengths != {n_rows} or memory.keys.shape[1] != len(memory.bands):
        raise ValueError(f"its arrays are not of the same {n_rows} rows")
    n_bands = int(memory.bands.max()) + 1
    if len(found.weights) != n_bands:
        raise ValueError(f"expected {n_bands} weights of bands, found {len(found.weights)}")
    if memory.partition is not None and not fits(memory.partition, *memory.keys.shape):
        raise ValueError("its lists are not those of its rows")
    values: list[Tensor] = [memory.keys, memory.log_prices, torch.from_numpy(found.weights)]
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise ValueError("a key, a price or a weight is not finite")


def read(run: RunFolder, sha256: str = "") -> Remembered:
    """Reads the memory of a run.

    Args:
        sha256: of the file that the run was trained with, from the manifest of a checkpoint; empty if unknown.

    Raises:
        DataError: the file does not exist, is damaged, or is not the one that the run was trained with.
    """
    return from_bytes(run.read_as_trained(MEMORY, sha256), run.at(MEMORY))
