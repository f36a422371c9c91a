"""Whole objects by URL: `s3://…`, `gs://…`, `file:///…` or a path. Read, write atomically, list, hash.

Every function tries again while the store does not answer, up to `patience` seconds, and turns what the store says
into an error that names the URL and the cause.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable
from typing import BinaryIO, TypeVar, cast

from fusion.storage import backend, conditional, retry
from fusion.storage.backend import Entry as Entry
from fusion.storage.backend import sha256 as sha256
from fusion.storage.errors import explained

T = TypeVar("T")

_patience = 60.0


def set_patience(seconds: float) -> None:
    """Seconds for which a store that does not answer is asked again."""
    global _patience  # noqa: PLW0603 (a process waits equally long for every store)
    _patience = seconds


def patience() -> float:
    return _patience


def join(url: str, *parts: str) -> str:
    """The URL of what has this path below `url`.

    Raises:
        ConfigError: `url` is empty, so that this would be the root folder, or misspelt.
    """
    backend.check(url)
    return "/".join([url.rstrip("/"), *parts])


def base(url: str) -> str:
    """The last part of a URL: a file's or a folder's own name."""
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
    """Writes all of the object or nothing: readers see the previous bytes or these, never a part.

    Raises:
        DataError, CredentialsError, UnreachableError: as for `read`.
    """
    retrying(url, lambda: backend.put(url, data))


def copy(source: str, target: str) -> None:
    """Copies an object to another place in the same store, all of it or nothing.

    Raises:
        DataError, CredentialsError, UnreachableError: as for `read`.
    """
    retrying(source, lambda: backend.copy(source, target))


def create(url: str, data: bytes) -> bool:
    """Writes the object unless one exists; false when another one does.

    An object with the same bytes counts as written: an earlier try may have succeeded without saying so.
    """
    return retrying(url, lambda: conditional.create(url, data)) or read_if_exists(url) == data


def read_if_exists(url: str) -> bytes | None:
    """The object's bytes; None when it does not exist.

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
    """The object's bytes and a tag that changes with them; None when it does not exist."""
    return retrying(url, lambda: conditional.read_version(url))


def version_of(url: str) -> str:
    """A tag that changes when the object is written: the store's own, of a file its size, time and inode.

    Raises:
        DataError, CredentialsError, UnreachableError: as for `read`.
    """
    return retrying(url, lambda: backend.version(url))


def replace(url: str, data: bytes, version: str) -> bool:
    """Writes the object if it still has this version; false when somebody else was faster."""
    return retrying(url, lambda: conditional.replace(url, data, version)) or read_if_exists(url) == data


def remove(url: str) -> None:
    """Removes the object, or everything below the folder; nothing happens when there is none."""

    def rm() -> None:
        with backend.unless_absent(url):
            backend.remove(url)

    retrying(url, rm)


def honours_conditions(folder: str) -> bool:
    """Whether the store refuses to create an object twice and to replace one that has changed, tried on one of its own.

    A store that does not cannot tell two writers of one run apart: the log says so, and one writer is assumed.
    """
    url = join(folder, f".probe-{uuid.uuid4().hex}")
    try:
        if not _are_honoured(url):
            conditional.give_up_conditions(url, "it takes no notice of conditions on writes")
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
    """What is directly below `url`, with sizes and versions, sorted by URL; nothing when there is no such folder.

    Raises:
        DataError: there is no such bucket.
        CredentialsError, UnreachableError: as for `read`.
    """
    return retrying(url, lambda: backend.entries(url))


def ls(url: str) -> list[str]:
    """URLs directly below `url`, sorted; none when there is no such folder."""
    return [entry.url for entry in entries(url)]


def find(url: str) -> dict[str, Entry]:
    """All objects below `url` by their path below it: one request per 1000 objects. Empty when there is no such folder.

    Raises:
        DataError: there is no such bucket.
        CredentialsError, UnreachableError: as for `read`.
    """
    return retrying(url, lambda: backend.find(url))


def open_read(url: str, size: int | None = None, span: tuple[int, int] | None = None) -> BinaryIO:
    """A seekable file for reading parts of an object, without read-ahead; a known size saves a request.

    Args:
        span: first byte, and the one after the last, of a range that is fetched in one request when it is first needed.
    """
    fs, path = backend.locate(url)
    is_known = size is not None and backend.is_s3(fs)
    known = {"size": size} if is_known else {}
    file = retrying(url, lambda: fs.open(path, "rb", cache_type="none", **known))
    if is_known:
        file.details = {"name": path, "type": "file", **known}  # s3fs would ask for them before the first read
    cache = getattr(file, "cache", None)
    if cache is not None:  # not a local file: each part is asked for again by itself, not the whole from its start
        fetch = cache.fetcher
        cache.fetcher = _at_once(span, lambda start, end: retrying(url, lambda: fetch(start, end)))
    return cast(BinaryIO, file)


Fetch = Callable[[int, int], bytes]


def _at_once(span: tuple[int, int] | None, fetch: Fetch) -> Fetch:
    """The same, where all of the span is fetched with the first range that lies in it."""
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
    """JSON for people and programs to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def retrying(url: str, action: Callable[[], T]) -> T:
    """Result of `action`, tried again while the store is silent; its failure as an error that names `url`."""
    try:
        return retry.persistently(url, action, _patience)
    except Exception as error:
        raise explained(url, error) from error
