"""Sends Python values between ranks, with large NumPy arrays as raw bytes.

A value is pickled with protocol 5, which leaves the memory of its arrays out of the pickle; that memory is sent
separately, without a copy. `torch.distributed.all_gather_object` would pickle the arrays, too, and pad the value of
each rank to the size of the largest.
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
    """Returns the value of rank 0 on every rank. The value that other ranks pass is ignored."""
    if dist.get_world_size(group) == 1:
        return value
    if dist.get_rank() > 0:
        return _received(lambda part: dist.broadcast(_tensor(part), src=0, group=group))  # type: ignore[no-any-return]
    for part in _messages(value):
        dist.broadcast(_tensor(part), src=0, group=group)
    return value


def send(value: object, target: int, group: Group) -> None:
    """Sends a value to one rank, which must call `receive`."""
    for part in _messages(value):
        dist.send(_tensor(part), dst=target, group=group)


def receive(source: int, group: Group) -> Any:
    """The value that another rank sends to this one."""
    return _received(lambda part: dist.recv(_tensor(part), src=source, group=group))


def _messages(value: object) -> list[Bytes]:
    """The messages that transfer a value, in order: size of the header, header, and each array that is not empty.

    The header contains the pickled value and the sizes of its arrays.
    """
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    arrays = [np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers]
    header = pickle.dumps((pickled, [array.size for array in arrays]))
    size = np.array([len(header)], dtype=np.int64).view(np.uint8)
    return [size, np.frombuffer(header, dtype=np.uint8), *(array for array in arrays if array.size)]


def _received(fill: Callable[[Bytes], object]) -> Any:
    """Receives the messages of `_messages` and rebuilds the value.

    Args:
        fill: receives the next message into the given array.
    """
    size = np.zeros(1, dtype=np.int64)
    fill(size.view(np.uint8))
    header = np.empty(int(size[0]), dtype=np.uint8)
    fill(header)
    pickled, sizes = pickle.loads(header.data)
    arrays = [np.empty(n_bytes, dtype=np.uint8) for n_bytes in sizes]
    for array in arrays:
        if array.size:
            fill(array)
    return pickle.loads(pickled, buffers=arrays)


def _tensor(part: Bytes) -> Tensor:
    # torch warns if the memory is read-only, so such parts are copied.
    return torch.from_numpy(part if part.flags.writeable else part.copy())
