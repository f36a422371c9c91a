"""What `--source` asks for, and the files that it names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fusion import storage
from fusion.errors import DataError, UsageError
from fusion.storage import Entry

FOLD = "{fold}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXAMPLE = "give --source clip_image=vectors.parquet, or --source clip_image=vectors.npy,ids.npy"
_WILDCARDS = "*?["
_FOREIGN = (".npz", ".pkl", ".pickle", ".pt", ".csv")


@dataclass(frozen=True)
class Request:
    """One `--source`.

    Attributes:
        name: of the source.
        vectors: URL of a file or a folder, or a pattern.
        ids: URL or pattern of the ids that belong to `.npy` files; empty for Parquet.
    """

    name: str
    vectors: str
    ids: str = ""


def requests(texts: Iterable[str], n_folds: int) -> dict[str, list[Request]]:
    """The requests by name of source, in their order. `{fold}` stands for each of the folds.

    Raises:
        UsageError: a text is not NAME=URL or NAME=URL,URL, or `{fold}` and the number of folds do not fit together.
    """
    found: dict[str, list[Request]] = {}
    for text in texts:
        for request in _of_folds(text, n_folds):
            found.setdefault(request.name, []).append(request)
    return found


def _of_folds(text: str, n_folds: int) -> list[Request]:
    name, _, urls = text.partition("=")
    if FOLD not in text:
        return [_request(text)]
    if not n_folds or FOLD not in name or FOLD not in urls:
        message = f"--source {text} has {FOLD}, expected it in the name and in the files, and the number of folds"
        raise UsageError(message, "for example --source 'clip_{fold}=fold_{fold}.parquet' --folds 5")
    return [_request(text.replace(FOLD, str(fold))) for fold in range(n_folds)]


def _request(text: str) -> Request:
    name, _, urls = text.partition("=")
    parts = urls.split(",")
    if not _NAME.fullmatch(name) or not all(parts) or len(parts) > 2:
        message = f"--source {text}: expected NAME=URL or NAME=VECTORS,IDS, with letters, digits, . _ - in the name"
        raise UsageError(message, _EXAMPLE)
    if parts[0].endswith(".npy") != (len(parts) == 2):
        found = f"{len(parts) - 1} files of ids for {parts[0]}"
        raise UsageError(f"--source {text}: expected ids for .npy files, and none for Parquet, found {found}", _EXAMPLE)
    if parts[0].endswith(_FOREIGN):
        message = f"--source {text}: expected Parquet or .npy"
        raise UsageError(message, "convert pickles with python -m fusion.convert, and save other arrays with np.save")
    return Request(name, *parts)


def pairs(request: Request) -> list[tuple[Entry, Entry]]:
    """The `.npy` files of a request: vectors with their ids, in the order of their names.

    Raises:
        DataError: a file does not exist, or the numbers of files differ.
    """
    vectors, ids = files(request.vectors, ".npy"), files(request.ids, ".npy")
    if len(vectors) != len(ids):
        message = f"{request.vectors} names {len(vectors)} files, {request.ids} names {len(ids)}"
        raise DataError(message, "name one file of ids for each file of vectors")
    return list(zip(vectors, ids, strict=True))


def files(url: str, ending: str = ".parquet") -> list[Entry]:
    """The files of a URL or pattern in the order of their names, and those with this ending in a folder.

    In a pattern, `*`, `?` and `[…]` match within one part of a path. Hidden files (`.x`, `_x`) are left out.

    Raises:
        DataError: there is no such file.
    """
    found = _matching(url)
    folders = [entry.url for entry in found if entry.is_folder]
    inside = [entry for folder in folders for entry in storage.entries(folder)]
    chosen = [entry for entry in found if not entry.is_folder]
    chosen += [entry for entry in inside if entry.url.endswith(ending) and not entry.is_folder]
    chosen = [entry for entry in chosen if storage.base(entry.url)[0] not in "._"]
    if not chosen:
        raise DataError(f"{url} is no file, and no folder with files *{ending}", "correct the path")
    return sorted(chosen, key=lambda entry: entry.url)


def _matching(url: str) -> list[Entry]:
    """The files and folders that match the URL, found part by part from the first one with a wildcard."""
    parts = url.rstrip("/").split("/")
    first = next((i for i, part in enumerate(parts) if set(part) & set(_WILDCARDS)), len(parts) - 1)
    folder = "/".join(parts[:first]) or ("/" if url.startswith("/") else ".")
    found: Sequence[Entry] = [Entry(folder, is_folder=True)]
    for part in parts[first:]:
        below = [entry for parent in found if parent.is_folder for entry in storage.entries(parent.url)]
        found = [entry for entry in below if fnmatchcase(storage.base(entry.url), part) or _is(entry, part)]
    return list(found)


def _is(entry: Entry, name: str) -> bool:
    """Whether the entry has exactly this name, which may contain brackets."""
    return storage.base(entry.url) == name
