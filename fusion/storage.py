"""Whole objects by URL: `s3://…`, `gs://…`, `file:///…` or a path. Read, write atomically, list, hash.

Every function tries again while the store does not answer, up to `patience` seconds, and turns what the store says
into an error that names the URL and the cause.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from fusion.answers import explained, is_absence, is_silence, named
from fusion.errors import ConfigError

T = TypeVar("T")

_TEMPORARY = ".tmp"
# One attempt a request: `retrying` alone tries again, so that `patience` is what a command waits.
_S3 = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 1}}}
_patience = 60.0


def set_patience(seconds: float) -> None:
    """Seconds for which a store that does not answer is asked again."""
    global _patience  # noqa: PLW0603 (a process waits equally long for every store)
    _patience = seconds


def patience() -> float:
    return _patience


def join(url: str, *parts: str) -> str:
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
    return retrying(url, lambda: _cat(url))


def write(url: str, data: bytes) -> None:
    """Writes all of the object or nothing: readers see the previous bytes or these, never a part.

    Raises:
        DataError, CredentialsError, UnreachableError: as for `read`.
    """
    retrying(url, lambda: _put(url, data))


def create(url: str, data: bytes) -> bool:
    """Writes the object unless one exists; false when another one does.

    An object with the same bytes counts as written: an earlier try may have succeeded without saying so.
    """
    return retrying(url, lambda: _create(url, data)) or read(url) == data


def read_if_exists(url: str) -> bytes | None:
    """The object's bytes; None when it does not exist.

    Raises:
        CredentialsError, UnreachableError: as for `read`.
    """

    def cat() -> bytes | None:
        with _unless_absent(url):
            return _cat(url)
        return None

    return retrying(url, cat)


def read_version(url: str) -> tuple[bytes, str] | None:
    """The object's bytes and a tag that changes with them; None when it does not exist."""
    return retrying(url, lambda: _read_version(url))


def version_of(url: str) -> str:
    """A tag that changes when the object is written: the store's own, of a file its size, time and inode.

    Raises:
        DataError, CredentialsError, UnreachableError: as for `read`.
    """

    def tag() -> str:
        fs, path = _locate(url)
        facts = fs.info(path)
        if _is_local(fs):
            facts["mtime"] = os.stat(path).st_mtime_ns
        return _tag(fs, path) or "-".join(str(facts.get(key)) for key in ("size", "mtime", "ino"))

    return retrying(url, tag)


def replace(url: str, data: bytes, version: str) -> bool:
    """Writes the object if it still has this version; false when somebody else was faster."""
    return retrying(url, lambda: _replace(url, data, version)) or read(url) == data


def remove(url: str) -> None:
    """Removes the object, or everything below the folder; nothing happens when there is none."""

    def rm() -> None:
        fs, path = _locate(url)
        with _unless_absent(url):
            fs.rm(path, recursive=True)

    retrying(url, rm)


def honours_conditions(folder: str) -> bool:
    """Whether the store refuses to create an object twice and to replace one that has changed, tried on one of its own.

    A store that does not cannot tell two writers of one run apart.
    """
    url = join(folder, f".probe-{uuid.uuid4().hex}")
    try:
        if not create(url, b"1") or retrying(url, lambda: _create(url, b"2")):
            return False
        held = read_version(url)
        write(url, b"3")
        return held is not None and not retrying(url, lambda: _replace(url, b"4", held[1]))
    finally:
        remove(url)


def exists(url: str) -> bool:
    def found() -> bool:
        fs, path = _locate(url)
        with _unless_absent(url):
            fs.info(path)  # and not fs.exists, to which any file that is missing on this machine is the object
            return True
        return False

    return retrying(url, found)


def ls(url: str) -> list[str]:
    """URLs directly below `url`, sorted; none when there is no such folder."""
    return retrying(url, lambda: _ls(url))


@dataclass(frozen=True)
class Found:
    """What a listing says of an object, without asking for it.

    Attributes:
        size: in bytes.
        modified: when it was last written; None where the store does not say.
    """

    url: str
    size: int
    modified: datetime | None


def find(url: str) -> dict[str, Found]:
    """All objects below `url` by their path below it: one request per 1000 objects. Empty when there is no such folder.

    Raises:
        CredentialsError, UnreachableError: as for `read`.
    """
    return retrying(url, lambda: _find(url))


def open_read(url: str) -> BinaryIO:
    """A seekable file for reading parts of an object, without read-ahead."""
    fs, path = _locate(url)
    file = retrying(url, lambda: fs.open(path, "rb", cache_type="none"))
    cache = getattr(file, "cache", None)
    if cache is not None:  # not a local file: each part is asked for again by itself, not the whole from its start
        fetch = cache.fetcher
        cache.fetcher = lambda start, end: retrying(url, lambda: fetch(start, end))
    return cast(BinaryIO, file)


def as_json(value: object) -> bytes:
    """JSON for people and programs to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def retrying(url: str, action: Callable[[], T]) -> T:
    """Result of `action`, tried again while the store is silent; its failure as an error that names `url`."""
    attempts = Retrying(
        stop=_silent_for(_patience),
        wait=wait_random_exponential(0.2, max=5),
        retry=retry_if_exception(is_silence),
        reraise=True,
    )
    try:
        return attempts(action)
    except Exception as error:
        raise explained(url, error) from error


def _silent_for(seconds: float) -> Callable[[RetryCallState], bool]:
    """Stops that long after the first failure: the time that a large object took before it does not count."""
    failures: list[float] = []

    def stop(state: RetryCallState) -> bool:
        failures.append(time.monotonic())
        return failures[-1] - failures[0] >= seconds

    return stop


def _locate(url: str) -> tuple[Any, str]:
    settings = _S3 | fsspec.config.conf.get("s3", {}) if url.startswith("s3://") else {}
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **settings)
    except (ImportError, ValueError) as error:  # fsspec says which package, or that it knows no such protocol
        raise ConfigError(f"{url} cannot be opened: {error}", "install that package, or correct the URL") from error
    if settings:
        fs.retries = 1
    return fs, path


@contextmanager
def _unless_absent(url: str) -> Iterator[None]:
    """Goes on after the block where the object does not exist."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if not is_absence(url, error):
            raise


def _is_local(fs: Any) -> bool:
    return "file" in fs.protocol


def _cat(url: str) -> bytes:
    fs, path = _locate(url)
    return bytes(fs.cat_file(path))


def _put(url: str, data: bytes) -> None:
    fs, path = _locate(url)
    if not _is_local(fs):
        _put_object(fs, path, data)
        return
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)


@contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A complete file beside `path`, to be moved or linked there; gone at the end."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}{_TEMPORARY}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _create(url: str, data: bytes) -> bool:
    fs, path = _locate(url)
    if not _is_local(fs):
        return _conditionally(lambda: fs.pipe_file(path, data, mode="create"))
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True


def _read_version(url: str) -> tuple[bytes, str] | None:
    fs, path = _locate(url)
    with _unless_absent(url):
        # The tag first: if the object changes in between, the older tag makes `replace` fail, as it must.
        tag = _tag(fs, path)
        data = bytes(fs.cat_file(path))
        return data, tag or sha256(data)
    return None


def _tag(fs: Any, path: str) -> str:
    """The store's own tag of an object's version; empty where it has none."""
    if _is_local(fs):
        return ""
    facts = fs.info(path)
    return str(facts.get("ETag") or facts.get("etag") or "")


def _replace(url: str, data: bytes, version: str) -> bool:
    fs, path = _locate(url)
    if "s3" in fs.protocol:
        return _conditionally(lambda: fs.pipe_file(path, data, IfMatch=version))
    if not _is_local(fs):
        fs.pipe_file(path, data)  # a store without conditions: one writer is assumed
        return True
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        current = _read_version(url)
        if current is None or current[1] != version:
            return False
        _put(url, data)
        return True
    finally:
        os.close(folder)


def _conditionally(put: Callable[[], None]) -> bool:
    try:
        put()
    except OSError as error:  # s3fs: FileExistsError or EINVAL, by version
        if isinstance(error, FileExistsError) or named(error, ("PreconditionFailed", "ConditionalRequestConflict")):
            return False
        raise
    return True


def _put_object(fs: Any, path: str, data: bytes) -> None:
    try:
        fs.pipe_file(path, data)  # a put is atomic
    except PermissionError:
        fs.ls(path.split("/")[0])  # some stores refuse a write to a bucket that does not exist: then say that
        raise


def _ls(url: str) -> list[str]:
    fs, path = _locate(url)
    names: list[str] = []
    with _unless_absent(url):
        names = fs.ls(path, detail=False)
    found = (name.rstrip("/") for name in names if name.strip("/") != path.strip("/"))
    return sorted(join(url, name.rsplit("/", 1)[-1]) for name in found if not name.endswith(_TEMPORARY))


def _find(url: str) -> dict[str, Found]:
    fs, path = _locate(url)
    listed: dict[str, dict[str, Any]] = {}
    with _unless_absent(url):
        listed = fs.find(path, detail=True)
    paths = {name.removeprefix(f"{path}/"): facts for name, facts in listed.items() if name.startswith(f"{path}/")}
    return {
        below: Found(join(url, below), int(facts["size"]), _modified(facts))
        for below, facts in paths.items()
        if not below.endswith((_TEMPORARY, "/"))
    }


def _modified(facts: dict[str, Any]) -> datetime | None:
    """S3 says LastModified; a file system, and Google's store, mtime; the store in memory, created."""
    when = next((facts[key] for key in ("LastModified", "mtime", "created") if facts.get(key)), None)
    return datetime.fromtimestamp(when, UTC) if isinstance(when, int | float) else cast(datetime | None, when)
