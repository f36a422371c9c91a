"""The Parquet files of a source, columns `sample_id` and `embedding`, each read in parts that cost one request each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusion import storage
from fusion.data.table_file import id_texts
from fusion.errors import DataError
from fusion.storage import Entry
from fusion.storage.errors import is_answer

STREAM_ROWS = 512  # rows decoded at a time: stays in the cache, and needs little memory besides the tensors
NUMPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"  # first bytes of .npy, and of .npz
# Bytes fetched at a time: a file or a row group of at most so many in one request, a larger row group in several, so
# that a file with one huge row group needs no more memory.
STREAM_BYTES = 1 << 22
COLUMNS = ("sample_id", "embedding")


@dataclass(frozen=True)
class Kind:
    """The vectors that all files of a source have, as the first of them shows.

    Attributes:
        url: that file.
        dim: numbers per vector.
        dtype: as NumPy calls it.
    """

    url: str
    dim: int
    dtype: str


@dataclass(frozen=True)
class Part:
    """What one reader reads: a small file, or one row group of a larger one.

    Attributes:
        size: bytes of the file.
        footer: of a larger file, read before; None of a small one, which is fetched whole.
    """

    url: str
    size: int
    footer: pq.FileMetaData | None = None
    row_group: int = 0

    @property
    def is_small(self) -> bool:
        return self.size <= STREAM_BYTES


def parts_of(entry: Entry) -> list[Part]:
    """The parts of a file; one request for the footer of a larger one, none for a small one.

    Raises:
        DataError: a larger file is no Parquet with ids and vectors.
    """
    whole = Part(entry.url, entry.size)
    if whole.is_small:
        return [whole]

    def read() -> pq.FileMetaData:
        with _opened(whole) as file:
            return file.metadata

    footer = storage.retrying(entry.url, read)
    return [Part(entry.url, entry.size, footer, group) for group in range(footer.num_row_groups)]


def content_of(part: Part) -> bytes | None:
    """All bytes of a small file; None of a larger one."""
    return storage.read(part.url) if part.is_small else None


def kind_of(part: Part, content: bytes | None) -> Kind | None:
    """What the vectors of a part's file are, by the first; None if it has none, as of a task that got no rows.

    Raises:
        DataError: the file is no Parquet with ids and vectors.
    """

    def read() -> Kind | None:
        with _opened(part, content) as file:
            kind = file.schema_arrow.field("embedding").type
            dim = _dim(file, kind)
            if dim == 0:
                raise DataError(f"{part.url} has vectors of 0 numbers", "write the embeddings again")
            return None if dim is None else Kind(part.url, dim, _dtype(kind))

    return storage.retrying(part.url, read)


Vectors = Iterator[tuple[np.ndarray, np.ndarray]]


@contextmanager
def open_part(part: Part, kind: Kind, content: bytes | None) -> Iterator[tuple[pa.ChunkedArray, Vectors]]:
    """The ids [N] large_string of a part, and its vectors [M, D] that are not null with their positions [M] among them.

    The vectors come batch by batch.

    Args:
        kind: what the vectors must be.
        content: the file's, if it is small.

    Raises:
        DataError: the file is damaged, lacks ids, or has vectors of another kind.
    """
    with _opened(part, content) as file:
        groups = list(range(file.num_row_groups)) if part.footer is None else [part.row_group]
        ids = id_texts(part.url, file.read_row_groups(groups, columns=["sample_id"]).column(0))
        if ids.null_count:
            message = f"{part.url} has {ids.null_count} rows without a sample_id among {len(ids)}"
            raise DataError(message, "give every row an id")
        yield ids, _batches(part.url, file, groups, kind)


def _batches(url: str, file: pq.ParquetFile, groups: list[int], kind: Kind) -> Vectors:
    start = 0
    for batch in file.iter_batches(STREAM_ROWS, groups, columns=["embedding"], use_threads=False):
        vectors, positions = _vectors(url, batch.column(0), kind)
        yield vectors, start + positions
        start += len(batch)


@contextmanager
def _opened(part: Part, content: bytes | None = None) -> Iterator[pq.ParquetFile]:
    with _raw(part, content) as raw, _damage_named(part.url, raw), _parquet(raw, part.footer) as file:
        if part.footer is None:  # the schema of one with a footer was looked at when that was read
            _check_columns(part.url, file.schema_arrow)
        yield file


def _parquet(raw: BinaryIO | pa.BufferReader, footer: pq.FileMetaData | None) -> pq.ParquetFile:
    return pq.ParquetFile(raw, metadata=footer, buffer_size=STREAM_BYTES, pre_buffer=False)


def _raw(part: Part, content: bytes | None) -> BinaryIO | pa.BufferReader:
    if content is not None:
        return pa.BufferReader(content)
    span = None if part.footer is None else _span(part.footer.row_group(part.row_group))
    return storage.open_read(part.url, part.size, span)


def _span(group: pq.RowGroupMetaData) -> tuple[int, int] | None:
    """The range of bytes that has the ids and vectors of a row group; None if it is too large to be fetched at once."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in COLUMNS]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    start = min(starts)
    end = max(first + chunk.total_compressed_size for first, chunk in zip(starts, chunks, strict=True))
    return (start, end) if end - start <= STREAM_BYTES else None


@contextmanager
def _damage_named(url: str, raw: BinaryIO | pa.BufferReader) -> Iterator[None]:
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
    for column in COLUMNS:
        if column not in schema.names:
            raise DataError(f"{url} has no column {column!r}; it has {schema.names}", "add or rename the column")
    found = schema.field("embedding").type
    if not _is_vector(found):
        message = f"column 'embedding' of {url} is {found}, expected a list of float16, float32 or float64"
        raise DataError(message, "write the column as expected")


def _is_vector(kind: pa.DataType) -> bool:
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(is_list(kind) for is_list in lists) and pa.types.is_floating(kind.value_type)


def _dtype(kind: pa.DataType) -> str:
    return {"halffloat": "float16", "float": "float32", "double": "float64"}[str(kind.value_type)]


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


def _vectors(url: str, column: pa.Array, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """[M, D] vectors that are not null, and [M] their positions in the column."""
    rows = np.arange(len(column))
    if column.null_count:
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        column = column.drop_null()
    if len(column):
        _check_kind(url, column, kind)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), kind.dim), rows


def _check_kind(url: str, column: pa.Array, kind: Kind) -> None:
    """Raises a DataError with both figures unless all vectors, of which none is null, are of this kind."""
    is_fixed = pa.types.is_fixed_size_list(column.type)
    lengths = np.array([column.type.list_size]) if is_fixed else pc.list_value_length(column).to_numpy()
    others = lengths[lengths != kind.dim]
    if len(others) and (url == kind.url or len(others) < len(lengths)):
        raise DataError(f"{url} has vectors of {kind.dim} and of {others[0]} numbers", "write vectors of one length")
    dim, dtype = (others[0] if len(others) else kind.dim), _dtype(column.type)
    if (dim, dtype) != (kind.dim, kind.dtype):
        raise DataError(
            f"{url} has vectors of {dim} x {dtype}, {kind.url} of {kind.dim} x {kind.dtype}",
            "write all files of a source with the same encoder and type",
        )
