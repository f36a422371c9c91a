"""Tensors in shared memory of the ranks of a node, so that each node holds the embeddings only once."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fusion.distributed.world import World
from fusion.errors import ConfigError
from fusion.storage.scratch import temporary_folder


def node_tensor(shape: tuple[int, ...], dtype: torch.dtype, world: World) -> Tensor:
    """A tensor of zeros that all ranks of a node share. All ranks must call this in the same order.

    Raises:
        ConfigError: the node has too little memory and disk for it.
    """
    if world.local_size == 1:
        return torch.zeros(shape, dtype=dtype)
    size = int(np.prod(shape))
    file = world.together(lambda: _reserved(size * dtype.itemsize) if world.local_rank == 0 else None)
    paths = world.exchange(f"/proc/{os.getpid()}/fd/{file.fileno()}" if file else "")
    path = paths[world.rank - world.local_rank]
    shared = torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
    world.together(lambda: None)  # waits until all ranks have mapped the file; after that, it can be closed
    if file:
        file.close()
    return shared


def _shared_folders() -> Iterator[str]:
    yield "/dev/shm"
    with suppress(ConfigError):  # without a temporary folder, the error below still names /dev/shm
        yield temporary_folder()


def _reserved(n_bytes: int) -> IO[bytes]:
    """An unnamed file of this size, in /dev/shm if it fits there, else in the temporary folder.

    As it has no name, the kernel frees it when the job dies.

    Raises:
        ConfigError: it fits in neither.
    """
    found = []
    for folder in _shared_folders():
        try:
            room = os.statvfs(folder)
            if (
                n_bytes > room.f_bavail * room.f_frsize
            ):  # without this check, a failing fallocate briefly fills the disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller closes it)
            # All blocks are allocated now. With a sparse file, a later lack of memory would kill the rank by SIGBUS.
            os.posix_fallocate(file.fileno(), 0, max(1, n_bytes))
            return file
        except OSError as error:
            found.append(f"{folder} ({error.strerror})")
    raise ConfigError(
        f"the ranks of this node share an array of {n_bytes >> 20} MiB, which does not fit in {' nor in '.join(found)}",
        "enlarge /dev/shm (docker: --shm-size; Kubernetes: sizeLimit of the volume shm)",
    )
