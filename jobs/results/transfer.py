"""Fetches objects into a folder: whole files, several at a time, verified by sha256.

A file gets its name once all of it is written and its hash is right, so a broken fetch goes on with the first file that
is not there. Files that a manifest names come before the manifest, so the rule of the bucket holds in the folder too:
without `MANIFEST.json` nothing is complete.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fusion import log, storage
from fusion.errors import ConfigError, DataError, FusionError, UnreachableError
from fusion.records.schemas import FileEntry, Seal, seal_of

_REMEDY = "pull another run or submission, or make this one again; `python -m fusion.verify URL` says what else"

# Files at a time, each whole in memory: of a run the largest, state.pt, has about 200 MB.
N_FILES = 4


@dataclass(frozen=True)
class Item:
    """One object to fetch.

    Attributes:
        path: where below the folder.
        entry: what a manifest promises of it; None for what no manifest names, which is fetched each time.
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


def fetch(plan: Plan, folder: str) -> tuple[dict[str, Outcome], int]:
    """Fetches what is not there yet: what became of every path, and how many bytes came over the network.

    Raises:
        DataError: an object is not what its manifest says, or is no longer there.
        ConfigError: the folder cannot be written.
        CredentialsError, UnreachableError: as for `fusion.storage.read`, or the disk is full; what was fetched stays.
    """
    outcomes: dict[str, Outcome] = {}
    n_fetched = n_done = 0
    pool = ThreadPoolExecutor(N_FILES)
    with log.progress("pull", plan.n_bytes) as show:
        futures = {pool.submit(_fetch_one, item, Path(folder, item.path)): item for item in plan.items}
        try:
            for future in as_completed(futures):
                item = futures[future]
                outcomes[item.path], n_bytes = future.result()
                n_fetched += n_bytes
                n_done += item.entry.bytes if item.entry else 0
                show(n_done)
        except BaseException as error:
            # Files under way are finished and stay, but Ctrl-C does not wait for them.
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise
    pool.shutdown()
    for path, content in plan.last.items():
        _write(Path(folder, path), content)
    return outcomes, n_fetched


def damaged(plan: Plan, folder: str) -> dict[str, str]:
    """Paths whose files are not what their manifests say, and what is wrong with each. Fetches nothing."""
    named = {item.path: item.entry for item in plan.items if item.entry}
    wrong = {path: _difference(Path(folder, path), entry) for path, entry in named.items()}
    return {path: what for path, what in wrong.items() if what}


def _difference(path: Path, entry: FileEntry) -> str:
    if not os.path.isfile(path):  # Path.is_file raises for what this user may not look at
        return "is missing"
    try:
        with path.open("rb") as file:
            n_bytes, found = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if n_bytes != entry.bytes:
        return f"has {n_bytes} bytes, its manifest says {entry.bytes}"
    return "" if found == entry.sha256 else f"has sha256 {found[:12]}, its manifest says {entry.sha256[:12]}"


def _fetch_one(item: Item, target: Path) -> tuple[Outcome, int]:
    """What became of the file, and how many bytes were read for it."""
    if item.entry and not _difference(target, item.entry):
        return Outcome.THERE, 0
    outcome = Outcome.FETCHED
    if item.entry and os.path.lexists(target):
        outcome = Outcome.REPLACED
        _remove(target)  # what is wrong does not keep its name, also when the fetch fails
    content = storage.read(item.url)
    if item.entry:
        _verify(item.url, content, item.entry)
    elif item.path.endswith(".json") and seal_of(content) is Seal.BROKEN:
        raise DataError(f"{item.url} is damaged: {Seal.BROKEN.value}", _REMEDY)
    elif _holds(target, content):
        return Outcome.THERE, len(content)
    _write(target, content)
    return outcome, len(content)


def _holds(target: Path, content: bytes) -> bool:
    try:
        return target.read_bytes() == content
    except OSError:
        return False


def _verify(url: str, content: bytes, entry: FileEntry) -> None:
    if len(content) != entry.bytes:
        raise DataError(f"{url} has {len(content)} bytes, its manifest says {entry.bytes}", _REMEDY)
    found = storage.sha256(content)
    if found != entry.sha256:
        raise DataError(f"{url} is damaged: sha256 {found[:12]}, its manifest says {entry.sha256[:12]}", _REMEDY)


def _remove(target: Path) -> None:
    try:
        target.unlink()
    except OSError as error:
        raise _unwritable(target, error) from error


def _write(target: Path, content: bytes) -> None:
    """Writes the file whole, beside its place first: a link that stands there is replaced, not followed."""
    try:
        storage.write(str(target), content)
    except UnreachableError:  # the disk is full
        raise
    except (OSError, FusionError) as error:  # what the disk says, in words that are meant for a store
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{target} cannot be written ({error})", "name another folder with --to")
