"""Fetches files of a store, so that they can be read as local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from fusion import storage
from fusion.errors import DataError, UsageError


def open_store(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. UsageError if the URL is not usable."""
    try:
        store, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"{url} is not a usable URL ({error})", "give a path, or a URL such as s3://bucket/a"
        ) from None
    return store, path


def fetch(url: str, scratch: Path) -> Path:
    """A local file with the content of `url`: the file itself if it is local, else a copy in `scratch`."""
    store, path = open_store(url)
    local = Path(path)
    if not isinstance(store, LocalFileSystem):
        local = scratch / uuid4().hex
        storage.retrying(url, lambda: store.get_file(path, str(local)))
    if not local.is_file():
        raise DataError(f"{url} is not a file that exists", "check the path")
    return local
