"""Tensors in shared memory of the ranks of a node, so that each node holds the embeddings only once."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fusion.data.mapped_file import MappedFile
from fusion.distributed.world import World
from fusion.errors import ConfigError
from fusion.storage.scratch import temporary_folder

_ENLARGE = "enlarge /dev/shm (docker: --shm-size; Kubernetes: sizeLimit of the volume shm)"


def node_tensor(shape: tuple[int, ...], dtype: torch.dtype, world: World) -> Tensor:
    """A tensor of zeros that all ranks of a node share. All ranks must call this in the same order.

    Raises:
        ConfigError: the node has too little memory and disk for it.
    """
    size = int(np.prod(shape))
    if world.local_size == 1:
        return _private_tensor(size, dtype).view(shape)
    with _shared_file(size * dtype.itemsize, world, _shared_folders(), _ENLARGE) as path:
        return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)


def _private_tensor(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros [size], which the kernel provides page by page when they are first used.

    So the threads that read vectors take the page faults, in parallel. `torch.zeros` writes all zeros at once. Huge
    pages would save most faults, but a virtual machine may have given them back to its host, and wait for them.
    """
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=size) if size else torch.zeros(0, dtype=dtype)


def node_file(shape: tuple[int, ...], dtype: torch.dtype, world: World, folder: str) -> MappedFile:
    """An array of zeros on disk that all ranks of a node share. It has no name, so that it ends with the job.

    Raises:
        ConfigError: the folder's disk has too little room for it.
    """
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    with _shared_file(n_bytes, world, [folder], "name a folder on a larger disk: --cache FOLDER") as path:
        return MappedFile(Path(path), shape, dtype, writable=True)


@contextmanager
def _shared_file(n_bytes: int, world: World, folders: Iterable[str], remedy: str) -> Iterator[str]:
    """The path of a new file that all ranks of a node map within this context."""
    file = world.together(lambda: _reserved(n_bytes, folders, remedy) if world.local_rank == 0 else None)
    try:
        yield world.of_node(f"/proc/{os.getpid()}/fd/{file.fileno()}" if file else "")
        world.together(lambda: None)  # waits until all ranks have mapped the file; after that, it can be closed
    finally:
        if file:
            file.close()


def _shared_folders() -> Iterator[str]:
    yield "/dev/shm"
    with suppress(ConfigError):  # without a temporary folder, the error below still names /dev/shm
        yield temporary_folder()


def _reserved(n_bytes: int, folders: Iterable[str], remedy: str) -> IO[bytes]:
    """An unnamed file of this size, in the first of these folders that it fits in.

    As it has no name, the kernel frees it when the job dies.

    Raises:
        ConfigError: it fits in none.
    """
    found = []
    for folder in folders:
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
        remedy,
    )
