"""Writes ids and vectors as a Parquet file that training reads, at any URL and atomically."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from fusion import storage
from fusion.convert.arrays import ROW_GROUP, Embeddings
from fusion.convert.fetch import open_store


def write(embeddings: Embeddings, url: str, scratch: Path) -> None:
    """Writes a Parquet file to `url` atomically: a kill at any moment leaves the complete file, or none."""
    store, path = open_store(url)
    if isinstance(store, LocalFileSystem):
        storage.retrying(url, lambda: _write_local(embeddings, Path(path)))
        return
    # Uploading a complete file is atomic. If the file were written to the store piece by piece, then closing it after
    # an error would commit an incomplete file.
    whole = scratch / "converted.parquet"
    _write_local(embeddings, whole)
    storage.retrying(url, lambda: store.put_file(str(whole), path))


def _write_local(embeddings: Embeddings, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")  # a rename is only atomic within a file system
    try:
        _write_parquet(embeddings, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(embeddings: Embeddings, path: Path) -> None:
    schema = embeddings.batch(0).schema
    plain = {"compression": "none", "use_dictionary": False}  # embeddings hardly compress
    with path.open("wb") as file, pq.ParquetWriter(file, schema, **plain) as writer:
        for start in range(0, len(embeddings.ids), ROW_GROUP):
            writer.write_batch(embeddings.batch(start), row_group_size=ROW_GROUP)
        writer.close()
        os.fsync(file.fileno())  # otherwise a crash after the rename could leave an empty or incomplete file
