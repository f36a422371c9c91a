"""Reads the Parquet files of a source, with columns `sample_id` and `embedding`, in parts of about one request each.

A part is a small file, or a row group of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusion import storage
from fusion.data.plain_pages import NotPlain, plain_chunk, plain_vectors
from fusion.data.table_file import id_texts
from fusion.errors import DataError
from fusion.storage import Entry
from fusion.storage.errors import is_store_error

STREAM_ROWS = 512  # rows decoded at a time; they fit in the CPU's cache and need little memory beside the tensors
NUMPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"  # the first bytes of .npy and .npz files
# Bytes per request. A file or row group of up to this size (4 MiB) is fetched in one request; a larger row group in
# several, so that memory stays bounded even if a file has a single huge row group.
STREAM_BYTES = 1 << 22
LOCAL_BYTES = 1 << 16  # bytes per read of a file of this machine, if they do not go straight to their destination
COLUMNS = ("sample_id", "embedding")


@dataclass(frozen=True)
class Kind:
    """Length and type of a source's vectors, taken from its first file that has any; all its files must match.

    Attributes:
        url: that file.
        dim: numbers per vector.
        dtype: name of the NumPy dtype.
    """

    url: str
    dim: int
    dtype: str


@dataclass(frozen=True)
class Part:
    """What one task reads: a small file, or one row group of a larger file.

    Attributes:
        size: bytes of the file.
        footer: metadata of a larger file; None for a small file, which is fetched as a whole.
    """

    url: str
    size: int
    footer: pq.FileMetaData | None = None
    row_group: int = 0

    @property
    def is_small(self) -> bool:
        return self.size <= STREAM_BYTES


def parts_of(entry: Entry) -> list[Part]:
    """The parts of a file. This takes one request for the footer of a larger file, and no request for a small one.

    Raises:
        DataError: a larger file is not a Parquet file with ids and vectors.
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
    """All bytes of a small file; None for a larger one."""
    return storage.read(part.url) if part.is_small else None


def kind_of(part: Part, content: bytes | None) -> Kind | None:
    """Length and type of the first vector in the part's file; None if the file has no rows, as Spark may write.

    Raises:
        DataError: the file is not a Parquet file with ids and vectors.
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
    """Opens a part, and gives its ids [N] large_string and an iterator over batches of its vectors.

    A batch consists of the vectors [M, D] that are not null, and their positions [M] among the ids.

    Args:
        kind: length and type that the vectors must have.
        content: the bytes of the file, if it is small.

    Raises:
        DataError: the file is damaged, lacks ids, or has vectors of another kind.
    """
    with _raw(part, content) as raw, _opened_from(raw, part) as file:
        groups = list(range(file.num_row_groups)) if part.footer is None else [part.row_group]
        ids = id_texts(part.url, file.read_row_groups(groups, columns=["sample_id"]).column(0))
        if ids.null_count:
            message = f"{part.url} has {ids.null_count} rows without a sample_id among {len(ids)}"
            raise DataError(message, "give every row an id")
        yield ids, _batches(part, raw, file, groups, kind)


def _batches(
    part: Part, raw: BinaryIO | pa.BufferReader, file: pq.ParquetFile, groups: list[int], kind: Kind
) -> Vectors:
    """The vectors of plain pages; if pages turn out not to be plain, all vectors again, as pyarrow decodes them."""
    chunk = None if part.footer is None else plain_chunk(part.footer, part.row_group, kind.dim, kind.dtype)
    if chunk is not None:
        buffer = LOCAL_BYTES if storage.is_local(part.url) else STREAM_BYTES
        with suppress(NotPlain):
            yield from _numbered(plain_vectors(raw, chunk, kind.dim, buffer))
            return
    yield from _decoded(part.url, file, groups, kind)


def _numbered(batches: Iterable[np.ndarray]) -> Vectors:
    start = 0
    for vectors in batches:
        yield vectors, np.arange(start, start + len(vectors))
        start += len(vectors)


def _decoded(url: str, file: pq.ParquetFile, groups: list[int], kind: Kind) -> Vectors:
    start = 0
    for batch in file.iter_batches(STREAM_ROWS, groups, columns=["embedding"], use_threads=False):
        vectors, positions = _vectors(url, batch.column(0), kind)
        yield vectors, start + positions
        start += len(batch)


@contextmanager
def _opened(part: Part, content: bytes | None = None) -> Iterator[pq.ParquetFile]:
    with _raw(part, content) as raw, _opened_from(raw, part) as file:
        yield file


@contextmanager
def _opened_from(raw: BinaryIO | pa.BufferReader, part: Part) -> Iterator[pq.ParquetFile]:
    with _damage_named(part.url, raw), _parquet(raw, part.footer) as file:
        if part.footer is None:  # for a part with a footer, this was checked when the footer was read
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
    """The byte range of a row group's ids and vectors; None if it is too large for one request."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in COLUMNS]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    start = min(starts)
    end = max(first + chunk.total_compressed_size for first, chunk in zip(starts, chunks, strict=True))
    return (start, end) if end - start <= STREAM_BYTES else None


@contextmanager
def _damage_named(url: str, raw: BinaryIO | pa.BufferReader) -> Iterator[None]:
    """Turns an error of pyarrow about damaged bytes into a DataError that names the file. Errors of the store pass."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if is_store_error(error):
            raise
        raw.seek(0)
        if raw.read(len(NUMPY_MAGIC)).startswith((NUMPY_MAGIC, ZIP_MAGIC)):
            raise DataError(f"{url} is a NumPy file", _convert(url)) from error
        reason = str(error).splitlines()[0]
        raise DataError(f"{url} is not a complete Parquet file: {reason}", "write or upload the file again") from error


def _convert(url: str) -> str:
    npy = f"{url.removesuffix('.parquet')}.npy"
    command = f"python -m fusion.convert --embeddings {npy} --ids IDS.npy --to {url}"
    return f"rename it to {npy}, then convert it with its ids: `{command}`"


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
    """Length of the first vector; None if there is no vector."""
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
    """[M, D] the vectors that are not null, and [M] their positions in the column."""
    rows = np.arange(len(column))
    if column.null_count:
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        column = column.drop_null()
    if len(column):
        _check_kind(url, column, kind)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), kind.dim), rows


def _check_kind(url: str, column: pa.Array, kind: Kind) -> None:
    """Raises a DataError unless all vectors have this dimension and type. The caller has dropped nulls."""
    is_fixed = pa.types.is_fixed_size_list(column.type)
    lengths = np.array([column.type.list_size]) if is_fixed else pc.list_value_length(column).to_numpy()
    others = lengths[lengths != kind.dim]
    # The lengths differ within this file, rather than between it and the source's first file.
    if len(others) and (url == kind.url or len(others) < len(lengths)):
        raise DataError(f"{url} has vectors of {kind.dim} and of {others[0]} numbers", "write vectors of one length")
    dim, dtype = (others[0] if len(others) else kind.dim), _dtype(column.type)
    if (dim, dtype) != (kind.dim, kind.dtype):
        raise DataError(
            f"{url} has vectors of {dim} x {dtype}, {kind.url} of {kind.dim} x {kind.dtype}",
            "write all files of a source with the same encoder and type",
        )
