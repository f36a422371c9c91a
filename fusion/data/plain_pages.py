"""Reads the vectors of a Parquet row group whose pages hold them as they are in memory: uncompressed and plain.

In Parquet each number comes with two levels, which say where a list begins and what is null. pyarrow decodes both for
every number, which takes longer than reading the numbers. Here the encoded levels of a page are compared with those of
vectors of one length without nulls. They are almost always the same bytes as those of the page before.

`fusion.prepare` and `fusion.convert` write such pages. For all other files, `NotPlain` is raised and pyarrow is used.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq

PHYSICAL = {"float16": "FIXED_LEN_BYTE_ARRAY", "float32": "FLOAT", "float64": "DOUBLE"}
LARGEST_PAGE = 1 << 22  # bytes; writers make pages of about 1 MiB
N_LEVELS = 256  # encoded levels of pages that are remembered, each of some kB


class NotPlain(Exception):
    """The pages are not plain, or damaged: pyarrow has to read them."""


@dataclass(frozen=True)
class Chunk:
    """The numbers of a row group.

    Attributes:
        start, end: bytes of the file.
        n_values: how many numbers.
        dtype: name of their NumPy dtype.
        max_definition: the definition level of a number that is not null.
    """

    start: int
    end: int
    n_values: int
    dtype: str
    max_definition: int


def plain_chunk(footer: pq.FileMetaData, row_group: int, dim: int, dtype: str) -> Chunk | None:
    """The numbers of a row group, if its metadata allow them to be plain vectors of this length; else None."""
    group = footer.row_group(row_group)
    numbers = [number for number in range(group.num_columns) if _is_vector(group.column(number))]
    if len(numbers) != 1:
        return None
    chunk, schema = group.column(numbers[0]), footer.schema.column(numbers[0])
    is_plain = chunk.compression == "UNCOMPRESSED" and set(chunk.encodings) <= {"PLAIN", "RLE", "BIT_PACKED"}
    is_flat = schema.max_repetition_level == 1 and chunk.num_values == group.num_rows * dim
    if not (is_plain and is_flat and chunk.physical_type == PHYSICAL[dtype]) or chunk.dictionary_page_offset:
        return None
    start = chunk.data_page_offset
    end = start + chunk.total_compressed_size
    return Chunk(start, end, chunk.num_values, dtype, schema.max_definition_level)


def _is_vector(column: pq.ColumnChunkMetaData) -> bool:
    return bool(column.path_in_schema.split(".")[0] == "embedding")


def plain_vectors(file: BinaryIO, chunk: Chunk, dim: int, buffer_size: int) -> Iterator[np.ndarray]:
    """The vectors [M, dim] of each page. They are valid until the next ones are asked for.

    Args:
        file: the whole Parquet file.
        buffer_size: bytes that are read from it at a time.

    Raises:
        NotPlain: a page is not plain.
    """
    stream = io.BufferedReader(_Range(file, chunk.start, chunk.end), buffer_size)
    scratch, n_read = np.empty(LARGEST_PAGE, np.uint8), 0
    while n_read < chunk.n_values:
        n_values, n_bytes = _page(stream)
        if n_values % dim or not 0 < n_values <= LARGEST_PAGE:
            raise NotPlain
        n_bytes -= _check_levels(stream, n_values, dim, chunk.max_definition)
        if n_bytes > LARGEST_PAGE or n_bytes != n_values * np.dtype(chunk.dtype).itemsize:
            raise NotPlain
        values = scratch[:n_bytes]
        if stream.readinto(values.data) < n_bytes:
            raise NotPlain
        n_read += n_values
        yield values.view(chunk.dtype).reshape(-1, dim)
    if n_read > chunk.n_values:
        raise NotPlain


class _Range(io.RawIOBase):
    """A range of bytes of a file, as a stream."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._position, self._end = file, start, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._position)
        n_bytes = self._file.readinto(memoryview(buffer)[: self._end - self._position])  # type: ignore[attr-defined]
        self._position += n_bytes
        return int(n_bytes)


def _page(stream: BinaryIO) -> tuple[int, int]:
    """Reads the header of a page; returns its number of values and its bytes after the header."""
    header = _struct(stream)
    page_type, n_bytes, stored, values = (header.get(key) for key in (1, 2, 3, 5))
    if page_type != 0 or n_bytes != stored or not isinstance(values, dict):
        raise NotPlain  # not a data page (version 1)
    n_values, encoding, *levels = (values.get(key) for key in (1, 2, 3, 4))
    is_plain = encoding == 0 and levels == [3, 3]  # plain numbers, and runs of levels
    if not is_plain or not isinstance(n_bytes, int) or not isinstance(n_values, int):
        raise NotPlain
    return n_values, n_bytes


def _check_levels(stream: BinaryIO, n_values: int, dim: int, max_definition: int) -> int:
    """Reads the levels of a page, and returns their bytes. Raises NotPlain if they are not those of plain vectors."""
    repetition, definition = _sized(stream), _sized(stream)
    is_plain = _starts_every(dim, repetition, n_values) and _is_constant(max_definition, definition, n_values)
    if not is_plain:
        raise NotPlain
    return 8 + len(repetition) + len(definition)


def _sized(stream: BinaryIO) -> bytes:
    return _read(stream, int.from_bytes(_read(stream, 4), "little"))


@lru_cache(N_LEVELS)
def _starts_every(dim: int, encoded: bytes, n_values: int) -> bool:
    """Whether these repetition levels are those of vectors of `dim` numbers: 0 for the first of each, else 1."""
    expected = np.ones(n_values, np.uint8)
    expected[::dim] = 0
    return np.array_equal(_decoded(encoded, n_values, 1), expected)


@lru_cache(N_LEVELS)
def _is_constant(level: int, encoded: bytes, n_values: int) -> bool:
    return bool((_decoded(encoded, n_values, level.bit_length()) == level).all())


def _decoded(encoded: bytes, n_values: int, width: int) -> np.ndarray:
    """Decodes runs of levels ("RLE/bit-packing hybrid" in the format's description): [n_values] uint8.

    Args:
        width: bits per level, at most 8.
    """
    levels, stream, done = np.empty(n_values, np.uint8), io.BytesIO(encoded), 0
    while done < n_values:
        header = _varint(stream)
        if header & 1:  # groups of eight levels
            packed = _read(stream, (header >> 1) * width)
            bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
            run = bits.reshape(-1, width) @ (1 << np.arange(width))
        else:
            run = np.broadcast_to(np.uint8(_byte(stream)), min(header >> 1, n_values))
        if not len(run):
            raise NotPlain
        levels[done : done + len(run)] = run[: n_values - done]
        done += len(run)
    return levels


# The structures of Parquet are written in Thrift's compact protocol: per field a byte with the field's number, as
# the difference to the number before, and its type.
def _struct(stream: BinaryIO) -> dict[int, Any]:
    """Reads a structure: the values of its fields by their numbers."""
    fields, number = dict[int, Any](), 0
    while head := _byte(stream):
        number = number + (head >> 4) if head >> 4 else _signed(stream)
        fields[number] = _value(stream, head & 15)
    return fields


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind in (1, 2):
        return kind == 1  # a bool
    if kind in (4, 5, 6):
        return _signed(stream)
    if kind == 8:
        return _read(stream, _varint(stream))
    if kind == 12:
        return _struct(stream)
    raise NotPlain  # headers of pages have no other types


def _signed(stream: BinaryIO) -> int:
    number = _varint(stream)
    return (number >> 1) ^ -(number & 1)


def _varint(stream: BinaryIO) -> int:
    number = shift = 0
    while (byte := _byte(stream)) & 128:
        number |= (byte & 127) << shift
        shift += 7
    return number | byte << shift


def _byte(stream: BinaryIO) -> int:
    return _read(stream, 1)[0]


def _read(stream: BinaryIO, n_bytes: int) -> bytes:
    content = stream.read(n_bytes) if n_bytes <= LARGEST_PAGE else b""
    if len(content) < n_bytes:
        raise NotPlain
    return content
