"""Tensors in memory that the ranks of a node share, so that each node holds the embeddings once."""

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
    """Zeros that all ranks of a node see; every rank calls this in the same order.

    Raises:
        ConfigError: the node has no room for them.
    """
    if world.local_size == 1:
        return torch.zeros(shape, dtype=dtype)
    size = int(np.prod(shape))
    file = world.together(lambda: _reserved(size * dtype.itemsize) if world.local_rank == 0 else None)
    paths = world.exchange(f"/proc/{os.getpid()}/fd/{file.fileno()}" if file else "")
    path = paths[world.rank - world.local_rank]
    shared = torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
    world.together(lambda: None)  # all have mapped it
    if file:
        file.close()
    return shared


def _shared_folders() -> Iterator[str]:
    yield "/dev/shm"
    with suppress(ConfigError):  # without one, the error names what was wrong with /dev/shm
        yield temporary_folder()


def _reserved(n_bytes: int) -> IO[bytes]:
    """A file without a name, so that nothing is left when the job dies: in memory if it fits there.

    Raises:
        ConfigError: it fits nowhere.
    """
    found = []
    for folder in _shared_folders():
        try:
            room = os.statvfs(folder)
            if n_bytes > room.f_bavail * room.f_frsize:  # reserving what there is would fill the disk for a moment
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (its holder closes it)
            # Reserved at once: a sparse file would end the rank by SIGBUS when the memory runs out later.
            os.posix_fallocate(file.fileno(), 0, max(1, n_bytes))
            return file
        except OSError as error:
            found.append(f"{folder} ({error.strerror})")
    raise ConfigError(
        f"the ranks of this node share an array of {n_bytes >> 20} MiB, which does not fit in {' nor in '.join(found)}",
        "enlarge /dev/shm (docker: --shm-size; Kubernetes: sizeLimit of the volume shm)",
    )
