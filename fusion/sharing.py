"""Tensors in memory that the ranks of a node share, so that each node holds the embeddings once."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from fusion.distributed import World
from fusion.errors import ConfigError

SHARED_FOLDERS = ("/dev/shm", tempfile.gettempdir())


def node_tensor(shape: tuple[int, ...], dtype: torch.dtype, world: World) -> Tensor:
    """Zeros that all ranks of a node see; every rank calls this in the same order.

    Raises:
        ConfigError: the node has no room for them.
    """
    if world.local_size == 1:
        return torch.zeros(shape, dtype=dtype)
    token = world.on_main(lambda: os.urandom(8).hex())
    size = int(np.prod(shape))
    mine = world.together(lambda: _shared_file(token, size * dtype.itemsize) if world.local_rank == 0 else "")
    path = world.exchange(mine)[world.rank - world.local_rank]
    shared = torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
    world.together(lambda: None)
    if world.local_rank == 0:
        os.unlink(path)  # the mappings keep it alive, and nothing is left behind when the job dies
    return shared


def _shared_file(token: str, n_bytes: int) -> str:
    """A file of that size for the ranks of a node to share: in memory if it fits there.

    Raises:
        ConfigError: it fits nowhere.
    """
    found = []
    for folder in SHARED_FOLDERS:
        path = os.path.join(folder, f"fusion-{token}.rows")
        try:
            with open(path, "wb") as file:
                # Reserved at once: a sparse file would end the rank by SIGBUS when the memory runs out later.
                os.posix_fallocate(file.fileno(), 0, max(1, n_bytes))
            return path
        except OSError as error:
            found.append(f"{folder} ({error.strerror})")
            with suppress(OSError):
                os.unlink(path)
    raise ConfigError(
        f"the ranks of this node share an array of {n_bytes >> 20} MiB, which fits neither {' nor '.join(found)}",
        "enlarge /dev/shm (docker: --shm-size; Kubernetes: sizeLimit of the volume shm)",
    )
