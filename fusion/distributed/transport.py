"""Python values between the ranks of a group, where large arrays travel as raw bytes, each at its own size.

A value is pickled (protocol 5) into a short lead; the memory of its NumPy arrays stays outside the pickle and is sent
as it is, without a copy. `all_gather_object` would pickle the arrays too, and pad every rank's value to the largest.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Group = dist.ProcessGroup | None
Bytes = NDArray[np.uint8]


def broadcast(value: T, group: Group) -> T:
    """The value of rank 0, on every rank; what the others give does not count. Rank 0 keeps its own object."""
    if dist.get_world_size(group) == 1:
        return value
    if dist.get_rank() > 0:
        return _received(lambda part: dist.broadcast(_tensor(part), src=0, group=group))  # type: ignore[no-any-return]
    for part in _parts(value):
        dist.broadcast(_tensor(part), src=0, group=group)
    return value


def send(value: object, target: int, group: Group) -> None:
    """Sends a value to one rank, which calls `receive`."""
    for part in _parts(value):
        dist.send(_tensor(part), dst=target, group=group)


def receive(source: int, group: Group) -> Any:
    """The value that a rank sends."""
    return _received(lambda part: dist.recv(_tensor(part), src=source, group=group))


def _parts(value: object) -> list[Bytes]:
    """What is sent of a value, in this order: the size of the lead, the lead, and the arrays that are not empty."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    arrays = [np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers]
    lead = pickle.dumps((pickled, [array.size for array in arrays]))
    size = np.array([len(lead)], dtype=np.int64).view(np.uint8)
    return [size, np.frombuffer(lead, dtype=np.uint8), *(array for array in arrays if array.size)]


def _received(fill: Callable[[Bytes], object]) -> Any:
    """The value whose parts `fill` puts into the memory it is given, in the order of `_parts`."""
    size = np.zeros(1, dtype=np.int64)
    fill(size.view(np.uint8))
    lead = np.empty(int(size[0]), dtype=np.uint8)
    fill(lead)
    pickled, sizes = pickle.loads(lead.data)
    arrays = [np.empty(n_bytes, dtype=np.uint8) for n_bytes in sizes]
    for array in arrays:
        if array.size:
            fill(array)
    return pickle.loads(pickled, buffers=arrays)


def _tensor(part: Bytes) -> Tensor:
    return torch.from_numpy(part if part.flags.writeable else part.copy())  # torch warns of memory it may not write
