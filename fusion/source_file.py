"""One Parquet file of a source, columns `sample_id` and `embedding`: its header, and its vectors as a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusion import storage
from fusion.answers import is_answer
from fusion.errors import DataError
from fusion.table_file import id_texts

STREAM_ROWS = 512  # rows decoded at a time: stays in the cache, and needs little memory besides the tensors
NUMPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"  # first bytes of .npy, and of .npz
STREAM_BYTES = 1 << 22  # bytes fetched at a time, so that a file with one huge row group needs no more memory


@dataclass(frozen=True)
class SourceFile:
    """A file whose footer has been read: what is read of it later costs one request per part, and none besides."""

    url: str
    size: int
    footer: pq.FileMetaData


@dataclass(frozen=True)
class Header:
    """What a file says before its vectors are read.

    Attributes:
        dim: length of its vectors; None if it has none, as the part of a task that was left without rows.
        ids: [N] large_string.
        group_rows: rows of each row group.
    """

    file: SourceFile
    dim: int | None
    dtype: str
    ids: pa.ChunkedArray
    group_rows: list[int]


def read_header(url: str, size: int | None = None) -> Header:
    """What a file of this many bytes says of itself.

    Raises:
        DataError: the file is no Parquet with ids and vectors.
    """

    def read() -> Header:
        with storage.open_read(url, size) as raw, _damage_named(url, raw), _parquet(raw) as file:
            _check_columns(url, file.schema_arrow)
            ids = id_texts(url, file.read(columns=["sample_id"]).column(0))
            if ids.null_count:
                raise DataError(f"{url} has {ids.null_count} rows without a sample_id", "give every row an id")
            dim, dtype = _dim_and_dtype(url, file)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            return Header(SourceFile(url, raw.seek(0, os.SEEK_END), file.metadata), dim, dtype, ids, groups)

    return storage.retrying(url, read)


def read_vectors(source: SourceFile, row_groups: Sequence[int], dim: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Vectors [M, D] of row groups that are not null, part by part, and the position [M] of each in these groups.

    Raises:
        DataError: the file is damaged, or has vectors of another length.
    """
    start, url = 0, source.url
    with storage.open_read(url, source.size) as raw, _damage_named(url, raw), _parquet(raw, source.footer) as file:
        for batch in file.iter_batches(STREAM_ROWS, row_groups, columns=["embedding"], use_threads=False):
            vectors, rows = _vectors(url, batch.column(0), dim)
            yield vectors, start + rows
            start += len(batch)


def _parquet(raw: BinaryIO, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    return pq.ParquetFile(raw, metadata=footer, buffer_size=STREAM_BYTES, pre_buffer=False)


@contextmanager
def _damage_named(url: str, raw: BinaryIO) -> Iterator[None]:
    """Turns what pyarrow says of broken bytes into an error that names the file; what the store says passes."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if is_answer(error):
            raise
        raw.seek(0)
        if raw.read(len(NUMPY_MAGIC)).startswith((NUMPY_MAGIC, ZIP_MAGIC)):
            raise DataError(f"{url} is a NumPy file", "convert it with python -m fusion.convert") from error
        reason = str(error).splitlines()[0]
        raise DataError(f"{url} is no complete Parquet file: {reason}", "write or upload the file again") from error


def _check_columns(url: str, schema: pa.Schema) -> None:
    for column in ("sample_id", "embedding"):
        if column not in schema.names:
            raise DataError(f"{url} has no column {column!r}; it has {schema.names}", "add or rename the column")
    found = schema.field("embedding").type
    if not _is_vector(found):
        message = f"column 'embedding' of {url} is {found}, expected a list of float16, float32 or float64"
        raise DataError(message, "write the column as expected")


def _is_vector(kind: pa.DataType) -> bool:
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(is_list(kind) for is_list in lists) and pa.types.is_floating(kind.value_type)


def _dim_and_dtype(url: str, file: pq.ParquetFile) -> tuple[int | None, str]:
    kind = file.schema_arrow.field("embedding").type
    dtype = {"halffloat": "float16", "float": "float32", "double": "float64"}[str(kind.value_type)]
    dim = _dim(file, kind)
    if dim == 0:
        raise DataError(f"{url} has vectors of 0 numbers", "write the embeddings again")
    return dim, dtype


def _dim(file: pq.ParquetFile, kind: pa.DataType) -> int | None:
    """Length of the first vector; None if there is none."""
    if file.metadata.num_rows == 0:
        return None
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    for batch in file.iter_batches(STREAM_ROWS, columns=["embedding"]):
        lengths = pc.list_value_length(batch.column(0)).drop_null()
        if len(lengths):
            return int(lengths[0].as_py())
    return None


def _vectors(url: str, column: pa.Array, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """[M, D] vectors that are not null, and [M] their positions in the column."""
    rows = np.arange(len(column))
    if column.null_count:
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        column = column.drop_null()
    if not pa.types.is_fixed_size_list(column.type):
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if (lengths != dim).any():
            other = lengths[lengths != dim][0]
            raise DataError(f"{url} has vectors of {dim} and of {other} numbers", "write vectors of one length")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), dim), rows
