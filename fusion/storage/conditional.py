"""Writes that happen only if an object does not exist, or still has a known version: one try per call.

A store or file system may lack what they need: conditions on requests (`If-None-Match`, `If-Match`), hard links, locks.
What is missing is named once, and done without: existence or version are then compared before the write, which is right
as long as there is one writer.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fusion.storage import backend
from fusion.storage.errors import is_unsupported, named

# How Linux says that a file system has no locks or no hard links: it depends on the file system. EBADF is what NFS says
# of a lock on a folder, EPERM what FAT says of a link, EMLINK what one without them may.
_NO_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_NO_LINK = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
_CONDITIONS = "conditional writes"


def has_conditions(url: str) -> bool:
    """Whether nothing speaks against conditions on writes to this store, as far as this process knows."""
    return not backend.is_lacking(url, _CONDITIONS)


def give_up_conditions(url: str, reason: str) -> None:
    """From now on, existence and versions are compared before each write to this store."""
    backend.name_lack(url, _CONDITIONS, reason, "never run two jobs with one --run-id at a time")


def create(url: str, data: bytes) -> bool:
    """Writes the object unless one exists; false when one does."""
    fs, path = backend.locate(url)
    if backend.is_local(fs):
        return _create_file(path, data)
    if not has_conditions(url):
        return _put_unless_there(url, data)
    return _conditionally(
        url, lambda: backend.pipe(fs, path, data, mode="create"), instead=lambda: _put_unless_there(url, data)
    )


def _put_unless_there(url: str, data: bytes) -> bool:
    if backend.is_there(url):
        return False
    backend.put(url, data)
    return True


def _create_file(path: str, data: bytes) -> bool:
    with backend.temporary(path, data) as complete:
        try:
            os.link(complete, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            backend.name_lack(path, "hard links", str(error), "one writer is assumed where locks are missing too")
            return _move_unless_there(complete, path)
    return True


def _move_unless_there(complete: str, path: str) -> bool:
    with _locked(os.path.dirname(path)):
        if os.path.lexists(path):
            return False
        os.replace(complete, path)
        return True


def read_version(url: str) -> tuple[bytes, str] | None:
    """The object's bytes and a tag that changes with them; None when it does not exist."""
    with backend.unless_absent(url):
        data, tag = backend.cat_tagged(url)
        return data, tag or backend.sha256(data)
    return None


def replace(url: str, data: bytes, version: str) -> bool:
    """Writes the object if it still has this version; false when it has another, or is gone."""
    fs, path = backend.locate(url)
    if backend.is_local(fs):
        with _locked(os.path.dirname(path)):
            return _compare_and_put(url, data, version)
    if not backend.is_s3(fs):  # fsspec has no replacement with a condition
        give_up_conditions(url, "its client cannot replace an object on condition")
    if not has_conditions(url):
        return _compare_and_put(url, data, version)
    return _conditionally(
        url,
        lambda: backend.pipe(fs, path, data, IfMatch=version),
        instead=lambda: _compare_and_put(url, data, version),
    )


def _compare_and_put(url: str, data: bytes, version: str) -> bool:
    current = read_version(url)
    if current is None or current[1] != version:
        return False
    backend.put(url, data)
    return True


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Holds the folder's lock, which this machine's processes respect, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCK:
                raise
            backend.name_lack(folder, "locks", str(error), "never run two jobs with one --run-id at a time")
        yield
    finally:
        os.close(descriptor)


def _conditionally(url: str, put: Callable[[], Any], instead: Callable[[], bool]) -> bool:
    """Whether the condition held; `instead` writes where the store does not take requests with one."""
    try:
        put()
    except FileNotFoundError as error:  # to replace: it is gone
        if named(error, ("NoSuchBucket",)):
            raise
        return False
    except OSError as error:  # s3fs: FileExistsError or EINVAL, by version
        if isinstance(error, FileExistsError) or named(error, ("PreconditionFailed", "ConditionalRequestConflict")):
            return False
        if not is_unsupported(error):
            raise
        written = instead()  # first: the store may refuse this write too, for another reason
        give_up_conditions(url, str(error))
        return written
    return True
