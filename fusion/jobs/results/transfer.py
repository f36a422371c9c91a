"""Downloads objects into a folder, several files at a time, and verifies their sha256.

A file gets its final name only after it is complete and its hash is verified, so that an interrupted download continues
with the files that are missing. A manifest is written after all files that it names. Thus the rule of the bucket holds
in the folder as well: a folder without `MANIFEST.json` is incomplete.
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

_REMEDY = "pull another run or submission, or make this one again; `python -m fusion.verify URL` checks all its files"

# Files at the same time. Each is held in memory as a whole; the largest one of a run, state.pt, has about 200 MB.
N_FILES = 4


@dataclass(frozen=True)
class Item:
    """One object to fetch.

    Attributes:
        path: where to write it, below the folder.
        entry: its size and sha256 from a manifest; None for a file that no manifest names, which is fetched each time.
    """

    url: str
    path: str
    entry: FileEntry | None = None


@dataclass(frozen=True)
class Plan:
    """What to fetch.

    Attributes:
        last: path and content of documents that were read already, such as manifests; they are written in this order
            after all items.
    """

    items: Sequence[Item]
    last: Mapping[str, bytes]

    @property
    def n_bytes(self) -> int:
        """Bytes of the files that manifests name."""
        return sum(item.entry.bytes for item in self.items if item.entry)


class Outcome(Enum):
    """What `fetch` did about a file."""

    THERE = "there already"
    FETCHED = "fetched"
    REPLACED = "damaged in the folder, and replaced"


def fetch(plan: Plan, folder: str) -> tuple[dict[str, Outcome], int]:
    """Fetches the files that are missing or damaged in the folder.

    Returns:
        The outcome for each path, and the number of bytes that were read from the store.

    Raises:
        DataError: an object differs from its manifest, or was deleted meanwhile.
        ConfigError: the folder cannot be written.
        CredentialsError: as for `fusion.storage.read`.
        UnreachableError: as for `fusion.storage.read`, or the disk is full. Files that were complete are kept.
    """
    outcomes: dict[str, Outcome] = {}
    n_fetched = n_done = 0
    pool = ThreadPoolExecutor(N_FILES)
    with log.progress("pull", plan.n_bytes, unit="bytes") as show:
        futures = {pool.submit(_fetch_one, item, Path(folder, item.path)): item for item in plan.items}
        try:
            for future in as_completed(futures):
                item = futures[future]
                outcomes[item.path], n_bytes = future.result()
                n_fetched += n_bytes
                n_done += item.entry.bytes if item.entry else 0
                show(n_done)
        except BaseException as error:
            # After an error, downloads under way are completed and kept. After Ctrl-C nobody waits for them.
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise
    pool.shutdown()
    for path, content in plan.last.items():
        _write(Path(folder, path), content)
    return outcomes, n_fetched


def find_damaged(plan: Plan, folder: str) -> dict[str, str]:
    """What is wrong with each file of the folder that differs from its manifest, by path. Fetches nothing."""
    named = {item.path: item.entry for item in plan.items if item.entry}
    wrong = {path: _difference(Path(folder, path), entry) for path, entry in named.items()}
    return {path: what for path, what in wrong.items() if what}


def _difference(path: Path, entry: FileEntry) -> str:
    """How a file differs from its manifest; empty when it does not."""
    if not os.path.isfile(path):  # Path.is_file raises PermissionError below folders of other users.
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
    """Fetches one file if it is needed; returns the outcome, and how many bytes were read from the store."""
    if item.entry and not _difference(target, item.entry):
        return Outcome.THERE, 0
    outcome = Outcome.FETCHED
    if item.entry and os.path.lexists(target):
        outcome = Outcome.REPLACED
        _remove(target)  # before the fetch, so that no damaged file is left if that fails
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
    """Whether the file exists with this content."""
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
    """Writes a temporary file and renames it: a symbolic link at the target is replaced, and not followed."""
    try:
        storage.write(str(target), content)
    except UnreachableError:  # which storage raises when the disk is full
        raise
    except (OSError, FusionError) as error:  # storage words its errors for stores; this one names --to
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{target} cannot be written ({error})", "name another folder with --to")
