"""Reads, writes (atomically), lists and removes whole objects by URL: `s3://…`, `gs://…`, `file:///…` or a path.

Every function retries for up to `patience()` seconds while the store is unreachable, and turns errors of the store into
Fusion's errors, which name the URL and the cause.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable
from typing import BinaryIO, TypeVar, cast

from fusion.storage import backend, conditional, ranges, retry
from fusion.storage.backend import Entry as Entry
from fusion.storage.backend import sha256 as sha256
from fusion.storage.errors import explained
from fusion.storage.ranges import Fetch

T = TypeVar("T")

_patience = 60.0


def set_patience(seconds: float) -> None:
    """Sets for how many seconds a request is retried while the store does not answer."""
    global _patience  # noqa: PLW0603 (a process waits equally long for every store)
    _patience = seconds


def patience() -> float:
    return _patience


def join(url: str, *parts: str) -> str:
    """The URL of a path below `url`.

    Raises:
        ConfigError: `url` is misspelt, or is empty, which would mean the root folder.
    """
    backend.check(url)
    return "/".join([url.rstrip("/"), *parts])


def base(url: str) -> str:
    """The last component of a URL: the name of the file or folder itself."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def read(url: str) -> bytes:
    """The object's bytes.

    Raises:
        DataError: it does not exist.
        CredentialsError: the store refuses.
        UnreachableError: the store does not answer.
    """
    return retrying(url, lambda: backend.cat(url))


def write(url: str, data: bytes) -> None:
    """Writes an object atomically: readers see either the previous bytes or all of these.

    Raises:
        DataError, CredentialsError, UnreachableError: as for `read`.
    """
    retrying(url, lambda: backend.put(url, data))


def copy(source: str, target: str) -> None:
    """Copies an object within a store, atomically.

    Raises:
        DataError, CredentialsError, UnreachableError: as for `read`.
    """
    retrying(source, lambda: backend.copy(source, target))


def create(url: str, data: bytes) -> bool:
    """Writes the object unless it exists. Returns whether the object now has these bytes.

    So an existing object with the same bytes counts as written: an earlier try may have succeeded although its answer
    was lost.
    """
    return retrying(url, lambda: conditional.create(url, data)) or read_if_exists(url) == data


def read_if_exists(url: str) -> bytes | None:
    """The object's bytes; None if it does not exist.

    Raises:
        DataError: there is no such bucket.
        CredentialsError, UnreachableError: as for `read`.
    """

    def cat() -> bytes | None:
        with backend.unless_absent(url):
            return backend.cat(url)
        return None

    return retrying(url, cat)


def read_version(url: str) -> tuple[bytes, str] | None:
    """The object's bytes and a tag that changes with them; None if it does not exist."""
    return retrying(url, lambda: conditional.read_version(url))


def replace(url: str, data: bytes, version: str) -> bool:
    """Writes the object if it still has this version. Returns whether it now has these bytes, as `create` does."""
    return retrying(url, lambda: conditional.replace(url, data, version)) or read_if_exists(url) == data


def remove(url: str) -> None:
    """Removes the object, or everything below the folder, if it exists."""

    def rm() -> None:
        with backend.unless_absent(url):
            backend.remove(url)

    retrying(url, rm)


def remove_temporary(folder: str) -> None:
    """Removes what killed processes have left of files that they were writing in a local folder.

    No other process may be writing there. Stores of objects have no such files.
    """
    retrying(folder, lambda: backend.remove_temporary(folder))


def honours_conditions(folder: str) -> bool:
    """Whether conditional writes work: tries on a temporary object whether the store rejects those that it must reject.

    It must reject creating an object that exists, and replacing one that has changed since it was read. A store that
    does not cannot keep two writers of one run apart. Then the log says so, and a single writer is assumed.
    """
    url = join(folder, f".probe-{uuid.uuid4().hex}")
    try:
        if not _are_honoured(url):
            conditional.give_up_conditions(url, "it ignores conditions on writes")
        return conditional.has_conditions(url)
    finally:
        remove(url)


def _are_honoured(url: str) -> bool:
    if not create(url, b"1") or retrying(url, lambda: conditional.create(url, b"2")):
        return False
    held = read_version(url)
    write(url, b"3")
    return held is not None and not retrying(url, lambda: conditional.replace(url, b"4", held[1]))


def exists(url: str) -> bool:
    return retrying(url, lambda: backend.is_there(url))


def entries(url: str) -> list[Entry]:
    """The objects and folders directly below `url`, sorted by URL; an empty list if there is no such folder.

    Raises:
        DataError: there is no such bucket.
        CredentialsError, UnreachableError: as for `read`.
    """
    return retrying(url, lambda: backend.entries(url))


def ls(url: str) -> list[str]:
    """URLs directly below `url`, sorted; an empty list if there is no such folder."""
    return [entry.url for entry in entries(url)]


def find(url: str) -> dict[str, Entry]:
    """All objects below `url` at any depth, by their path below it; empty if there is no such folder.

    This takes one request per 1000 objects.

    Raises:
        DataError: there is no such bucket.
        CredentialsError, UnreachableError: as for `read`.
    """
    return retrying(url, lambda: backend.find(url))


def is_local(url: str) -> bool:
    """Whether the URL is a path of this machine."""
    return backend.is_local(backend.locate(url)[0])


def open_read(url: str, size: int | None = None, span: tuple[int, int] | None = None) -> BinaryIO:
    """Opens a seekable file for reading parts of an object, without read-ahead.

    Args:
        size: bytes of the object, if known; this saves a request.
        span: start and end (exclusive) of a range of bytes that is fetched in one request when any of it is first read.
    """
    fs, path = backend.locate(url)
    fetch = ranges.fetch_of(fs, path, backend.S3_SETTINGS) if size is not None and backend.is_s3(fs) else None
    if size is not None and fetch is not None:
        return cast(BinaryIO, ranges.RangeFile(size, _at_once(span, _retried(url, fetch))))
    file = retrying(url, lambda: fs.open(path, "rb", cache_type="none"))
    cache = getattr(file, "cache", None)
    if cache is not None:  # a remote file: wrap its requests, so that a failed one is retried by itself
        cache.fetcher = _at_once(span, _retried(url, cache.fetcher))
    return cast(BinaryIO, file)


def _retried(url: str, fetch: Fetch) -> Fetch:
    return lambda start, end: retrying(url, lambda: fetch(start, end))


def _at_once(span: tuple[int, int] | None, fetch: Fetch) -> Fetch:
    """Wraps `fetch` so that the first request inside the span fetches the whole span, and later ones use it."""
    if span is None:
        return fetch
    first, last = span
    held = functools.cache(lambda: fetch(first, last))

    def fetch_once(start: int, end: int) -> bytes:
        if first <= start and end <= last:
            return held()[start - first : end - first]
        return fetch(start, end)

    return fetch_once


def as_json(value: object) -> bytes:
    """Indented JSON with a final newline."""
    return (json.dumps(value, indent=2) + "\n").encode()


def retrying(url: str, action: Callable[[], T]) -> T:
    """Runs `action`, retries it while the store does not answer, and turns its error into one that names `url`."""
    try:
        return retry.with_retries(url, action, _patience)
    except Exception as error:
        raise explained(url, error) from error
