"""Fetches objects into a folder: several at a time, verified by sha256, going on where a broken fetch ended.

A file gets its name once its hash is right; until then it is `<name>.<sha256>.part`. Files that a manifest names come
before the manifest, so the rule of the bucket holds in the folder too: without `MANIFEST.json` nothing is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

from fusion import log, storage
from fusion.errors import ConfigError, DataError
from fusion.records import FileEntry

N_THREADS = 8
CHUNK = 8 << 20  # bytes a request; what a pull that is killed loses of each file at most


@dataclass(frozen=True)
class Item:
    """One object to fetch.

    Attributes:
        path: where below the folder.
        entry: what a manifest promises of it; None for what no manifest names, which is fetched whole each time.
    """

    url: str
    path: str
    entry: FileEntry | None = None


@dataclass(frozen=True)
class Plan:
    """What to fetch, and documents that were read already, in the order they are to be written after all else."""

    items: Sequence[Item]
    last: Mapping[str, bytes]

    @property
    def n_bytes(self) -> int:
        """Bytes of the files that manifests name."""
        return sum(item.entry.bytes for item in self.items if item.entry)


class Outcome(Enum):
    THERE = "there already"
    FETCHED = "fetched"
    REPLACED = "damaged in the folder, and replaced"


@dataclass
class _Fetching:
    """What the threads of one fetch share."""

    folder: Path
    show: Callable[[int], None]
    stop: Event = field(default_factory=Event)
    fetched: int = 0
    done: int = 0
    lock: Lock = field(default_factory=Lock)

    def count(self, n_bytes: int, *, fetched: bool) -> None:
        """Raises _Stopped when another thread has failed."""
        with self.lock:
            self.done += n_bytes
            self.fetched += n_bytes if fetched else 0
            self.show(self.done)
        if self.stop.is_set():
            raise _Stopped


class _Stopped(Exception):
    pass


def fetch(plan: Plan, folder: str) -> tuple[dict[str, Outcome], int]:
    """Fetches what is not there yet: what became of every path, and how many bytes came over the network.

    Raises:
        DataError: an object is not what its manifest says, or is no longer there.
        ConfigError: the folder cannot be written, or somebody else pulls into it.
        CredentialsError, UnreachableError: as for `fusion.storage.read`; what was fetched stays.
    """
    with log.progress("pull", plan.n_bytes) as show, ThreadPoolExecutor(N_THREADS) as pool:
        fetching = _Fetching(Path(folder), show)
        futures = {pool.submit(_fetch_one, item, fetching): item for item in plan.items}
        try:
            outcomes = {futures[future].path: future.result() for future in as_completed(futures)}
        except BaseException:
            fetching.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    for path, content in plan.last.items():
        with _writing(Path(folder, path)) as target:
            storage.write(str(target), content)
    return outcomes, fetching.fetched


def damaged(plan: Plan, folder: str) -> dict[str, str]:
    """Paths whose files are not what their manifests say, and what is wrong with each. Fetches nothing."""
    named = {item.path: item.entry for item in plan.items if item.entry}
    with ThreadPoolExecutor(N_THREADS) as pool:
        wrong = pool.map(lambda path: _difference(Path(folder, path), named[path]), named)
    return {path: what for path, what in zip(named, wrong, strict=True) if what}


def _difference(path: Path, entry: FileEntry) -> str:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry.bytes:
        return f"has {path.stat().st_size} bytes, its manifest says {entry.bytes}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == entry.sha256 else f"has sha256 {found[:12]}, its manifest says {entry.sha256[:12]}"


def _fetch_one(item: Item, fetching: _Fetching) -> Outcome:
    with _writing(fetching.folder / item.path) as target:
        if item.entry is None:
            return _fetch_whole(item, target, fetching)
        if not _difference(target, item.entry):
            fetching.count(item.entry.bytes, fetched=False)
            return Outcome.THERE
        outcome = Outcome.REPLACED if target.exists() else Outcome.FETCHED
        target.unlink(missing_ok=True)  # what is wrong does not keep its name, also when the fetch fails
        _fetch_verified(item, item.entry, target, fetching)
        return outcome


def _fetch_whole(item: Item, target: Path, fetching: _Fetching) -> Outcome:
    content = storage.read(item.url)
    same = target.is_file() and target.read_bytes() == content
    if not same:
        storage.write(str(target), content)
    fetching.count(len(content), fetched=True)
    return Outcome.THERE if same else Outcome.FETCHED


def _fetch_verified(item: Item, entry: FileEntry, target: Path, fetching: _Fetching) -> None:
    part = target.with_name(f"{target.name}.{entry.sha256[:12]}.part")
    with _exclusively(part) as file:
        began = os.fstat(file.fileno()).st_size
        found = _complete(item, entry, file, fetching)
        if found != entry.sha256 and began:  # what was there may have been damaged since
            file.truncate(0)
            found = _complete(item, entry, file, fetching)
        if found != entry.sha256:
            part.unlink()
            raise DataError(
                f"{item.url} is damaged: sha256 {found[:12]}, its manifest says {entry.sha256[:12]}",
                "pull another run or submission, or make this one again; `python -m fusion.verify URL` says what else",
            )
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, target)


def _complete(item: Item, entry: FileEntry, file: BinaryIO, fetching: _Fetching) -> str:
    """Appends what is missing; the sha256 of the whole."""
    digest, n = hashlib.sha256(), 0
    file.seek(0)
    while block := file.read(CHUNK):
        digest.update(block)
        n += len(block)
    fetching.count(n, fetched=False)
    with storage.open_read(item.url) as source:
        size = source.seek(0, os.SEEK_END)
        if size != entry.bytes:
            raise DataError(
                f"{item.url} has {size} bytes, its manifest says {entry.bytes}", "pull another run or submission"
            )
        source.seek(n)
        while n < size:
            block = source.read(min(CHUNK, size - n))
            if not block:
                raise DataError(f"{item.url} has become shorter while it was read", "pull again")
            digest.update(block)
            file.write(block)
            file.flush()
            n += len(block)
            fetching.count(len(block), fetched=True)
    return digest.hexdigest()


@contextmanager
def _exclusively(path: Path) -> Iterator[BinaryIO]:
    """The file, to read and append, for one process at a time."""
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{path} is being written by another pull", "wait for it, or name another --to"
            ) from error
        yield file


@contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """The target, in a folder that exists; what the disk says against it becomes an error that names it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield target
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written ({error})", "make room, or name another folder with --to"
        ) from error
