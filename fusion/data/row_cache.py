"""Keeps the embeddings of a split in files on a node's disk, which later runs map into memory.

    <cache>/<key>/<role>.values                                [N, D] float16 or float32
                  <role>.present, <role>.zeros, <role>.known   [N] bool, see `SourceArrays`
                  MANIFEST.json                                shapes, types and sha256
            partial-<random>/                                  a folder that is being written

The key is a digest of the ids of the rows and of the versions of the sources' files. So when a file has changed, its
rows are read again, and those of before are removed. A folder is renamed to its key when it is complete, and its
content is compared with its sha256 whenever it is opened: block by block, on all cores.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import uuid4

import numpy as np
import pandas as pd
import torch
from pydantic import TypeAdapter
from torch import Tensor

from fusion import log, storage
from fusion.config import digest
from fusion.data.inputs import Sources
from fusion.data.mapped_file import MappedFile
from fusion.data.row_store import RowStore, SourceArrays
from fusion.distributed.world import World, held
from fusion.environment import usable_cores
from fusion.errors import ConfigError

SCHEMA = 1
MANIFEST = "MANIFEST.json"
Kinds = Mapping[str, tuple[int, torch.dtype]]  # role to the dimension and type of its vectors
Allocate = Callable[[int, Kinds], dict[str, SourceArrays]]  # from a number of rows
# A folder that a process has just made is not locked yet, so that younger ones are never taken for abandoned.
ABANDONED_SECONDS = 60.0
BLOCK_BYTES = 1 << 24  # of a file that are hashed at a time: few enough that all cores end at about the same time
ARRAYS = ("values", "present", "zeros", "known")
PARTIAL = "partial-"  # prefix of the name of a folder that is being written


@dataclass(frozen=True)
class CachedSource:
    """A source in the manifest.

    Attributes:
        dtype: of its vectors.
        n_unknown: number of its ids that the rows do not have.
    """

    dim: int
    dtype: Literal["float16", "float32"]
    n_unknown: int


@dataclass(frozen=True)
class CacheManifest:
    """Content of `MANIFEST.json`.

    Attributes:
        input: digest of what stays the same when the input changes: its URL, its split and its sources.
        sources: by role.
        sha256: of vectors and presence, see `RowStore.digest`.
        blocks: sha256 of each block of each file, by the name of the file; empty if an earlier version wrote it.
    """

    schema: int
    input: str
    n_rows: int
    sources: dict[str, CachedSource]
    sha256: str
    blocks: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """The embeddings of N rows and what is known of their sources.

    Attributes:
        arrays: by role.
        n_unknown: role to the number of its source's ids that the rows do not have.
    """

    store: RowStore
    arrays: Mapping[str, SourceArrays]
    n_unknown: Mapping[str, int]


@dataclass(frozen=True)
class CacheFolder:
    """The folder of the cache for some rows of some sources. It may not exist yet.

    Attributes:
        path: `<cache>/<key>`.
        input: as in `CacheManifest`.
    """

    path: Path
    input: str

    @classmethod
    def of(cls, cache: str, source: list[Any], files: Sources, ids: pd.Index) -> CacheFolder:
        """Args: source: what identifies the input across its versions, such as its URL."""
        same, rows = digest(source), storage.sha256("\n".join(ids).encode())
        versions = {role: [entry.version for entry in found] for role, found in files.items()}
        return cls(Path(cache).absolute() / digest([SCHEMA, same, rows, versions])[:32], same)

    def open(self, *, verify: bool = True) -> Loaded | None:
        """Maps the rows; None if they are not there, or, with a warning, if they are damaged.

        Args:
            verify: whether to compute their sha256, which takes a second of CPU time per GB.
        """
        try:
            made = _manifest(self.path)
            arrays = {role: _mapped(self.path, role, source, made.n_rows) for role, source in made.sources.items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
            self._warn(str(error).splitlines()[0])
            return None
        store = RowStore.of(arrays)
        if verify and not _is_intact(made, store, arrays):
            self._warn("its sha256 is not the one in its manifest")
            return None
        return Loaded(store, arrays, {role: source.n_unknown for role, source in made.sources.items()})

    def _warn(self, reason: str) -> None:
        log.warning(event="cache_damaged", folder=self.path, reason=reason, then="the sources are read again")


def kept_rows(folder: CacheFolder, read: Callable[[Allocate], Loaded], world: World) -> Loaded:
    """The rows in a folder of the cache; if a node does not have them, they are read and put there on every node.

    Args:
        read: reads the sources into arrays that the function which it is given allocates.

    Raises:
        ConfigError: the cache cannot be written, or has too little room.
    """
    is_first = world.local_rank == 0  # it verifies the rows for the other ranks of its node
    found = world.together(lambda: folder.open() if is_first else None)
    if all(world.exchange(found is not None or not is_first)):
        others = world.together(lambda: None if is_first else folder.open(verify=False))
        if all(world.exchange((found or others) is not None)):  # another job may have removed them in between
            log.info(event="cached_rows", folder=folder.path)
            return held(found or others)
    with CacheWriter(folder, world) as writer:
        loaded = read(writer.allocate)
        world.together(lambda: writer.commit(loaded))
    return loaded


class CacheWriter:
    """Writes a folder of the cache. The ranks of a node share its files; the first of them creates and commits it.

    First, rows of other versions of the same input are removed, so that their room can be used. Jobs that have mapped
    them keep them. It is a context manager, which removes what was not committed.

    Raises:
        ConfigError: the cache cannot be written, or has too little room.
    """

    def __init__(self, folder: CacheFolder, world: World) -> None:
        self._folder, self._world = folder, world
        self._partial = world.together(lambda: _PartialFolder(folder) if world.local_rank == 0 else None)
        self._path = Path(world.of_node(str(self._partial.path) if self._partial else ""))

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._partial:
            self._partial.remove()

    def allocate(self, n_rows: int, kinds: Kinds) -> dict[str, SourceArrays]:
        """Arrays of zeros in new files. Every rank of the node calls this."""
        sources = {role: CachedSource(dim, _name(dtype), 0) for role, (dim, dtype) in kinds.items()}
        self._world.together(lambda: _allocate(self._path, sources, n_rows) if self._partial else None)
        return {role: _mapped(self._path, role, source, n_rows, writable=True) for role, source in sources.items()}

    def commit(self, loaded: Loaded) -> None:
        """Gives the folder its name, unless another job of this machine has put the same rows there meanwhile."""
        if self._partial is None:
            return
        sources = {
            role: CachedSource(one.values.shape[1], _name(one.values.dtype), loaded.n_unknown[role])
            for role, one in loaded.arrays.items()
        }
        blocks = _blocks(loaded.arrays)
        made = CacheManifest(SCHEMA, self._folder.input, len(loaded.store), sources, loaded.store.digest, blocks)
        (self._path / MANIFEST).write_text(json.dumps(asdict(made), indent=1))
        with suppress(OSError):
            self._path.rename(self._folder.path)


class _PartialFolder:
    """A new folder of the cache, locked for as long as its process lives, so that others can tell it from a dead one.

    Raises:
        ConfigError: the cache cannot be written.
    """

    def __init__(self, folder: CacheFolder) -> None:
        cache = folder.path.parent
        self.path = cache / f"{PARTIAL}{uuid4().hex}"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(cache)
            _remove_others(folder)
            self.path.mkdir()
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"the cache {cache} cannot be written: {error.strerror}",
                "name a folder on a disk of this machine that can be written: --cache FOLDER",
            ) from error

    def remove(self) -> None:
        """Removes the folder, unless it was renamed."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(cache: Path) -> None:
    """Removes folders that killed processes were writing."""
    for folder in cache.glob(f"{PARTIAL}*"):
        with suppress(OSError):  # another process has removed it, or is writing it
            if time.time() - folder.stat().st_mtime < ABANDONED_SECONDS:
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _remove_others(folder: CacheFolder) -> None:
    """Removes folders with other versions of the same input, and a damaged one of this version."""
    shutil.rmtree(folder.path, ignore_errors=True)
    for other in folder.path.parent.iterdir():
        with suppress(OSError, ValueError):
            if not other.name.startswith(PARTIAL) and _manifest(other).input == folder.input:
                shutil.rmtree(other)


def _is_intact(made: CacheManifest, store: RowStore, arrays: Mapping[str, SourceArrays]) -> bool:
    """Whether the files have the sha256 of the manifest. If all blocks have, so has the whole, which is not hashed."""
    if made.blocks:
        vars(store)["digest"] = made.sha256  # a cached property
        return _blocks(arrays) == made.blocks
    return store.digest == made.sha256


def _blocks(arrays: Mapping[str, SourceArrays]) -> dict[str, list[str]]:
    """The sha256 of each block of each file, by the name of the file."""
    files = {f"{role}.{name}": getattr(one, name) for role, one in arrays.items() for name in ARRAYS}
    with ThreadPoolExecutor(usable_cores()) as pool:
        hashing = {name: [pool.submit(_sha256, block) for block in _split(file)] for name, file in files.items()}
        return {name: [block.result() for block in blocks] for name, blocks in hashing.items()}


def _split(array: Tensor) -> Iterator[np.ndarray]:
    content = array.numpy().reshape(-1).view(np.uint8)
    return (content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES))


def _sha256(block: np.ndarray) -> str:
    return hashlib.sha256(block.data).hexdigest()


def _manifest(folder: Path) -> CacheManifest:
    """Reads a manifest. Raises OSError or ValueError."""
    return TypeAdapter(CacheManifest).validate_json((folder / MANIFEST).read_bytes())


def _files(source: CachedSource, n_rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each file of a source, by the name of the array."""
    flags = dict.fromkeys(("present", "zeros", "known"), ((n_rows,), torch.bool))
    return {"values": ((n_rows, source.dim), getattr(torch, source.dtype)), **flags}


def _allocate(folder: Path, sources: Mapping[str, CachedSource], n_rows: int) -> None:
    """Creates the files of all sources, with the space that they need."""
    for role, source in sources.items():
        for name, (shape, dtype) in _files(source, n_rows).items():
            with open(folder / f"{role}.{name}", "xb") as file:
                try:
                    _reserve(file, math.prod(shape) * dtype.itemsize)
                except OSError as error:
                    needed = n_rows * sum(one.dim * getattr(torch, one.dtype).itemsize for one in sources.values())
                    raise ConfigError(
                        f"the cache {folder.parent} has no room for {needed / 2**30:.1f} GiB: {error.strerror}",
                        "free some space, or name a folder on a larger disk of this machine: --cache FOLDER",
                    ) from error


def _reserve(file: BinaryIO, n_bytes: int) -> None:
    """Gives a new file this size, with all of its space where the system can reserve it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    else:
        file.truncate(n_bytes)


def _mapped(folder: Path, role: str, source: CachedSource, n_rows: int, *, writable: bool = False) -> SourceArrays:
    files = {
        name: MappedFile(folder / f"{role}.{name}", shape, dtype, writable=writable)
        for name, (shape, dtype) in _files(source, n_rows).items()
    }
    return SourceArrays(**{name: file.tensor for name, file in files.items()}, file=files["values"])


def _name(dtype: torch.dtype) -> Literal["float16", "float32"]:
    return "float16" if dtype == torch.float16 else "float32"
