"""The operations that every store has: reading, writing, listing and deleting whole objects by URL.

Each function makes a single try, and raises the errors of the store's own client; `fusion.storage` adds retries and
explains the errors.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec.asyn import sync

from fusion import log
from fusion.errors import ConfigError
from fusion.storage.errors import is_absence, is_no_bucket

TEMPORARY = ".tmp"  # suffix of files that are being written
# Seconds until a request fails are few, because it is then retried. One try per request: only `storage.retrying`
# retries, so that a command waits for as long as `--store-timeout` says.
S3_SETTINGS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 1}}}
_S3_SCHEMES = ("s3://", "s3a://")
# Matches misspelt URLs such as `s3:/bucket`, `s3:bucket` and `s3//bucket`, which would be taken as local paths.
_MISSPELT = re.compile(r"(s3a?|gs|gcs|az|abfss?|adl)(?::/?|//+)(?!/)(.*)", re.IGNORECASE)
_N_DELETIONS = 8  # parallel delete requests; S3 allows 3,500 per second, but a small server only some tens
# Errors of fsync on file systems that do not support it, such as some FUSE ones, and on devices instead of files.
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_unsupported: set[tuple[str, str]] = set()  # (store, operation) pairs that were found not to work


@dataclass(frozen=True)
class Entry:
    """An object or a folder in a listing.

    Attributes:
        size: bytes; 0 for a folder.
        version: a tag that changes when the object is written; empty for a folder.
        modified: when it was last written; None for a folder, or if the store does not say.
    """

    url: str
    size: int = 0
    version: str = ""
    is_folder: bool = False
    modified: datetime | None = None


def locate(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        ConfigError: the URL is empty or misspelt, or the package for its protocol is not installed.
    """
    check(url)
    settings = S3_SETTINGS | fsspec.config.conf.get("s3", {}) if url.startswith(_S3_SCHEMES) else {}
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **settings)
    except (ImportError, ValueError) as error:  # fsspec names the missing package, or the unknown protocol
        raise ConfigError(f"{url} cannot be opened: {error}", "install that package, or correct the URL") from error
    if settings:
        fs.retries = 1
    return fs, path


def check(url: str) -> None:
    """Raises a ConfigError if the URL is empty or misspelt."""
    if not url:
        raise ConfigError("the URL of a bucket or folder is empty", "give one, such as s3://bucket/path")
    if misspelt := _MISSPELT.fullmatch(url):
        raise ConfigError(f"{url} is not a valid URL", f"did you mean {misspelt[1].lower()}://{misspelt[2]}?")
    if url.startswith(_S3_SCHEMES) and "?versionId=" in url:  # s3fs would take the rest as a version, not as the key
        raise ConfigError(f"{url} names one version of an object", "give the URL without ?versionId=")


def store_of(url: str) -> str:
    """The store of a URL: `s3://bucket`, or `/` for all local paths."""
    scheme, found, rest = url.partition("://")
    return f"{scheme}://{rest.split('/', 1)[0]}" if found else "/"


def is_lacking(url: str, operation: str) -> bool:
    """Whether `warn_unsupported` was called for this operation of this store."""
    return (store_of(url), operation) in _unsupported


def warn_unsupported(url: str, operation: str, reason: str, hint: str) -> None:
    """Warns, once per process, that a store does not support an operation, so that Fusion goes on without it."""
    if not is_lacking(url, operation):
        _unsupported.add((store_of(url), operation))
        log.warning(event="store_lacks", operation=operation, store=url, reason=reason, hint=hint)


def is_local(fs: Any) -> bool:
    return "file" in fs.protocol


def is_s3(fs: Any) -> bool:
    return "s3" in fs.protocol


@contextmanager
def unless_absent(url: str) -> Iterator[None]:
    """Leaves the block without an error if the object does not exist. A bucket that does not exist is an error."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_no_bucket(error) or not is_absence(url, error):
            raise


def cat(url: str) -> bytes:
    return cat_tagged(url)[0]


def cat_tagged(url: str) -> tuple[bytes, str]:
    """The object's bytes, and the store's tag of this version; an empty tag if the store has none."""
    fs, path = locate(url)
    if is_s3(fs):
        return _get(fs, path)
    # The tag is read first: if the object changes in between, then a replacement that expects the older tag fails.
    tag = "" if is_local(fs) else _version(fs.info(path))
    return bytes(fs.cat_file(path)), tag


def _get(fs: Any, path: str) -> tuple[bytes, str]:
    """Reads an object of S3 in a single request.

    s3fs would request the size first, and read a large object in several parts, which may be of different versions.
    """
    bucket, key, _ = fs.split_path(path)
    answer = fs.call_s3("get_object", Bucket=bucket, Key=key)
    try:
        return bytes(sync(fs.loop, answer["Body"].read)), str(answer.get("ETag", ""))
    finally:
        answer["Body"].close()


def copy(source: str, target: str) -> None:
    """Copies an object within a store, atomically. S3 copies it by itself, in one request."""
    fs, path = locate(source)
    if not is_s3(fs):
        put(target, cat(source))
        return
    bucket, key, _ = fs.split_path(path)
    to_bucket, to_key, _ = fs.split_path(locate(target)[1])
    fs.call_s3("copy_object", Bucket=to_bucket, Key=to_key, CopySource={"Bucket": bucket, "Key": key})


def put(url: str, data: bytes) -> None:
    """Writes an object atomically."""
    fs, path = locate(url)
    if is_local(fs):
        with temporary(path, data) as complete:
            os.replace(complete, path)
        return
    pipe(fs, path, data)


def pipe(fs: Any, path: str, data: bytes, **condition: str) -> None:
    """Writes an object in one atomic request.

    Args:
        condition: as s3fs takes it: `mode="create"`, or `IfMatch=version`.
    """
    try:
        fs.pipe_file(path, data, **condition)
    except PermissionError:
        # Some stores answer a write to a missing bucket with "access denied". Listing it then raises the true cause.
        fs.ls(path.split("/")[0])
        raise


@contextmanager
def temporary(path: str, data: bytes) -> Iterator[str]:
    """Writes a file in the folder of `path`, and yields its name, to be moved or linked. Removes it at the end."""
    _make_folder(os.path.dirname(path))
    name = f"{path}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with open(name, "wb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno(), path)
        yield name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def remove_temporary(folder: str) -> None:
    fs, path = locate(folder)
    if is_local(fs):
        for name in os.listdir(path):
            if name.endswith(TEMPORARY):
                with suppress(FileNotFoundError):  # another process has removed it
                    os.unlink(os.path.join(path, name))


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except (NotADirectoryError, FileExistsError, FileNotFoundError) as error:  # the last: below /proc
        there = path
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        reason = "no folder can be created there" if os.path.isdir(there) else "it is a file"
        raise ConfigError(
            f"cannot write below {there}: {reason}", "name a folder, or a bucket as s3://bucket"
        ) from error


def _sync(descriptor: int, path: str) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        warn_unsupported(path, "fsync", str(error), "a power failure may lose results: keep a copy elsewhere")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_there(url: str) -> bool:
    """Whether an object or a folder of this name exists."""
    fs, path = locate(url)
    with unless_absent(url):
        # Not fs.exists: it takes any FileNotFoundError, such as that of a credentials file, for a missing object.
        fs.info(path)
        return True
    return False


def _version(facts: Mapping[str, Any]) -> str:
    tag = facts.get("ETag") or facts.get("etag")
    return str(tag or "-".join(str(facts.get(key)) for key in ("size", "mtime", "created")))


def _file_version(facts: os.stat_result) -> str:
    return f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}"


def entries(url: str) -> list[Entry]:
    """The objects and folders directly below `url`, sorted by URL; an empty list if there is no such folder."""
    fs, path = locate(url)
    found: list[Entry] = []
    with unless_absent(url):
        found = [entry for entry in _entries(fs, path, url.rstrip("/")) if not entry.url.endswith(TEMPORARY)]
    return sorted(found, key=lambda entry: entry.url)


def _entries(fs: Any, path: str, url: str) -> list[Entry]:
    if is_local(fs):
        with os.scandir(path) as files:
            return [_file_entry(f"{url}/{file.name}", file) for file in files]
    if is_s3(fs):
        bucket, key, _ = fs.split_path(path)
        prefix = f"{key}/" if key else ""
        return [entry for page in _pages(fs, bucket, prefix, "/") for entry in _page_entries(page, prefix, url)]
    found = [facts for facts in fs.ls(path, detail=True) if facts["name"].strip("/") != path.strip("/")]
    return [_other_entry(f"{url}/{facts['name'].rstrip('/').rsplit('/', 1)[-1]}", facts) for facts in found]


def _file_entry(url: str, file: os.DirEntry[str]) -> Entry:
    try:
        facts = file.stat()
    except FileNotFoundError:  # a dangling link, or a file that was removed after the listing
        return Entry(url)
    if file.is_dir():
        return Entry(url, is_folder=True)
    return Entry(url, facts.st_size, _file_version(facts), modified=_moment(facts.st_mtime))


def _other_entry(url: str, facts: Mapping[str, Any]) -> Entry:
    if facts["type"] == "directory":
        return Entry(url, is_folder=True)
    return Entry(url, int(facts["size"] or 0), _version(facts), modified=_modified(facts))


def _modified(facts: Mapping[str, Any]) -> datetime | None:
    """When an object was written. The key is mtime for file systems and Google's store, created for memory://."""
    return next((_moment(facts[key]) for key in ("LastModified", "mtime", "created") if facts.get(key)), None)


def _moment(when: float | datetime) -> datetime:
    return when if isinstance(when, datetime) else datetime.fromtimestamp(when, UTC)


def _pages(fs: Any, bucket: str, prefix: str, delimiter: str) -> Iterator[Mapping[str, Any]]:
    """The pages of a listing of S3, with up to 1,000 keys each."""
    more: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter=delimiter, **more)
        yield page
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _page_entries(page: Mapping[str, Any], prefix: str, url: str) -> Iterator[Entry]:
    for folder in page.get("CommonPrefixes", []):
        yield Entry(f"{url}/{folder['Prefix'][len(prefix) :].rstrip('/')}", is_folder=True)
    for item in page.get("Contents", []):
        if not item["Key"].endswith("/"):  # some tools create an object "folder/" to represent a folder
            tag = item.get("ETag") or f"{item['Size']}-{item.get('LastModified')}"
            yield Entry(f"{url}/{item['Key'][len(prefix) :]}", item["Size"], tag, modified=item.get("LastModified"))


def find(url: str) -> dict[str, Entry]:
    """All objects below `url` at any depth, by their path below it; empty if there is no such folder."""
    fs, path = locate(url)
    found: list[Entry] = []
    with unless_absent(url):
        found = list(_all_below(fs, path, url.rstrip("/")))
    paths = {entry.url.removeprefix(f"{url.rstrip('/')}/"): entry for entry in found}
    return {below: entry for below, entry in paths.items() if not below.endswith((TEMPORARY, "/"))}


def _all_below(fs: Any, path: str, url: str) -> Iterator[Entry]:
    if is_s3(fs):
        bucket, key, _ = fs.split_path(path)
        prefix = f"{key}/" if key else ""
        for page in _pages(fs, bucket, prefix, ""):
            yield from _page_entries(page, prefix, url)
        return
    for name, facts in fs.find(path, detail=True).items():
        yield _other_entry(f"{url}/{name.removeprefix(f'{path}/')}", facts)


def remove(url: str) -> None:
    """Deletes the object, or everything below the folder.

    Objects are deleted by name, because `fs.rm` would expand characters such as `*` in names as patterns.
    """
    fs, path = locate(url)
    if is_local(fs):
        _remove_files(path)
        return
    with ThreadPoolExecutor(_N_DELETIONS) as pool:
        list(pool.map(lambda key: _remove_object(fs, key), _keys(fs, path)))


def _remove_files(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _remove_object(fs: Any, path: str) -> None:
    with suppress(FileNotFoundError):  # another process has deleted it
        fs.rm_file(path)


def _keys(fs: Any, path: str) -> list[str]:
    """Paths of the object itself and of everything below it."""
    if not is_s3(fs):
        return [str(found) for found in fs.find(path)]
    bucket, key, _ = fs.split_path(path)
    found = [item["Key"] for page in _pages(fs, bucket, key, "") for item in page.get("Contents", [])]
    return [f"{bucket}/{name}" for name in found if name == key or name.startswith(f"{key}/")]
