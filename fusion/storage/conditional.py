"""Conditional writes (compare-and-swap): only if the object does not exist, or still has a known version.

Each call makes a single try. They need conditional requests (`If-None-Match`, `If-Match`), or hard links and locks. If
a store or file system lacks one of these, there is a warning, and from then on existence or version are compared
before an ordinary write. That is correct as long as there is only one writer.
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

# Errors by which file systems say that they do not support locks or hard links. NFS fails with EBADF for a lock on a
# folder; FAT fails with EPERM for a hard link; other file systems without links may fail with EMLINK.
_NO_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_NO_LINK = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
_CONDITIONS = "conditional writes"


def has_conditions(url: str) -> bool:
    """Whether this process may use conditional requests with this store: true until they are found not to work."""
    return not backend.is_lacking(url, _CONDITIONS)


def give_up_conditions(url: str, reason: str) -> None:
    """Stops using conditional requests with this store; existence and version are compared before writes instead."""
    backend.warn_unsupported(url, _CONDITIONS, reason, "never run two jobs with the same --run-id at the same time")


def create(url: str, data: bytes) -> bool:
    """Writes the object unless it exists. Returns whether it was written."""
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
            backend.warn_unsupported(
                path, "hard links", str(error), "one writer is assumed if there are no locks either"
            )
            return _move_unless_there(complete, path)
    return True


def _move_unless_there(complete: str, path: str) -> bool:
    with _locked(os.path.dirname(path)):
        if os.path.lexists(path):
            return False
        os.replace(complete, path)
        return True


def read_version(url: str) -> tuple[bytes, str] | None:
    """The object's bytes and a tag that changes with them; None if it does not exist."""
    with backend.unless_absent(url):
        data, tag = backend.cat_tagged(url)
        return data, tag or backend.sha256(data)
    return None


def replace(url: str, data: bytes, version: str) -> bool:
    """Writes the object if it still has this version. Returns whether it was written."""
    fs, path = backend.locate(url)
    if backend.is_local(fs):
        with _locked(os.path.dirname(path)):
            return _compare_and_put(url, data, version)
    if not backend.is_s3(fs):  # fsspec has no conditional replacement for other stores
        give_up_conditions(url, "its client cannot replace an object conditionally")
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
    """Holds the folder's advisory lock, which all of Fusion's processes on this machine use, if locks are supported."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCK:
                raise
            hint = "never run two jobs with the same --run-id at the same time"
            backend.warn_unsupported(folder, "locks", str(error), hint)
        yield
    finally:
        os.close(descriptor)


def _conditionally(url: str, put: Callable[[], Any], instead: Callable[[], bool]) -> bool:
    """Runs `put`, a request with a condition, and returns whether the condition held.

    Args:
        instead: writes without a conditional request; used if the store does not support them.
    """
    try:
        put()
    except FileNotFoundError as error:  # the object to replace does not exist any more
        if named(error, ("NoSuchBucket",)):
            raise
        return False
    except OSError as error:  # a failed condition is FileExistsError or EINVAL, depending on the version of s3fs
        if isinstance(error, FileExistsError) or named(error, ("PreconditionFailed", "ConditionalRequestConflict")):
            return False
        if not is_unsupported(error):
            raise
        # Before the warning: if the store refuses this write, too, then the reason is not the condition.
        written = instead()
        give_up_conditions(url, str(error))
        return written
    return True
