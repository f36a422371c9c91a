"""Reads the files of a source in batches of ids and vectors, whatever their layout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from fusion.convert.arrays import PAIR, id_column, rows_of
from fusion.convert.fetch import fetch
from fusion.convert.numpy_file import read_npy
from fusion.data.source_file import Kind, content_of, kind_of, open_part, parts_of
from fusion.errors import DataError
from fusion.prepare.requests import Request, files, pairs
from fusion.storage import Entry

BATCH_BYTES = 1 << 25  # of vectors; large enough that a batch has several rows for each of hundreds of shards


class Input(Protocol):
    """A file with ids and vectors, or a pair of such files."""

    @property
    def files(self) -> tuple[Entry, ...]: ...

    def kind(self) -> Kind | None:
        """Length and type of the vectors; None if the file has none."""

    def batches(self, kind: Kind) -> Iterator[pl.DataFrame]:
        """The ids (`sample_id`, text) and vectors (`embedding`). DataError if the vectors are not of this kind."""

    def absolute(self) -> Input:
        """The same with absolute paths, for processes that run in other folders."""

    def on_worker(self, scratch: Path) -> Input:
        """The same for a process on another machine, which may use the folder `scratch`."""


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file with the columns `sample_id` and `embedding`."""

    file: Entry

    @property
    def files(self) -> tuple[Entry, ...]:
        return (self.file,)

    def kind(self) -> Kind | None:
        kinds = (kind_of(part, content_of(part)) for part in parts_of(self.file))
        return next((kind for kind in kinds if kind), None)

    def batches(self, kind: Kind) -> Iterator[pl.DataFrame]:
        for part in parts_of(self.file):
            with open_part(part, kind, content_of(part)) as (ids, batches):
                for vectors, positions in batches:
                    yield _frame(ids.take(pa.array(positions)), vectors)

    def absolute(self) -> ParquetFile:
        return ParquetFile(_absolute(self.file))

    def on_worker(self, _: Path) -> ParquetFile:
        return self


@dataclass(frozen=True)
class NumpyPair:
    """A `.npy` file of vectors (n, dim), and one of the n ids. Files of a store are copied to the folder `scratch`."""

    vectors: Entry
    ids: Entry
    scratch: Path

    @property
    def files(self) -> tuple[Entry, ...]:
        return self.vectors, self.ids

    @cached_property
    def _path(self) -> Path:
        return fetch(self.vectors.url, self.scratch)

    def _rows(self) -> tuple[NDArray[Any] | list[NDArray[Any]], Kind]:
        name = self.vectors.url
        rows, dtypes, dim = rows_of(read_npy(self._path, name), name)
        found = np.result_type(*dtypes)
        return rows, Kind(name, dim, found.name if found.kind == "f" else "float32")

    def kind(self) -> Kind:
        return self._rows()[1]

    def batches(self, kind: Kind) -> Iterator[pl.DataFrame]:
        mine = self.kind()
        if (mine.dim, mine.dtype) != (kind.dim, kind.dtype):
            raise DataError(
                f"{mine.url} has vectors of {mine.dim} x {mine.dtype}, {kind.url} of {kind.dim} x {kind.dtype}",
                "write all files of a source with the same encoder and type",
            )
        ids = id_column(read_npy(fetch(self.ids.url, self.scratch), self.ids.url), self.ids.url)
        n_rows, step = len(self._rows()[0]), max(1, BATCH_BYTES // (kind.dim * np.dtype(kind.dtype).itemsize))
        if n_rows != len(ids):
            raise DataError(f"{mine.url} has {n_rows} rows, {self.ids.url} has {len(ids)} ids", PAIR)
        for start in range(0, n_rows, step):
            # The file is mapped again for each batch: otherwise all pages that were read would stay in memory.
            rows = np.array(self._rows()[0][start : start + step], kind.dtype)
            yield _frame(pa.chunked_array([ids[start : start + step]]), rows)

    def absolute(self) -> NumpyPair:
        return replace(self, vectors=_absolute(self.vectors), ids=_absolute(self.ids))

    def on_worker(self, scratch: Path) -> NumpyPair:
        return replace(self, scratch=scratch)


def _absolute(entry: Entry) -> Entry:
    return replace(entry, url=absolute_url(entry.url))


def absolute_url(url: str) -> str:
    """The URL; of a path, the absolute one."""
    return url if "://" in url else os.path.abspath(url)


def _frame(ids: pa.ChunkedArray, vectors: NDArray[Any]) -> pl.DataFrame:
    """A batch. Vectors of float16 stay so; others become float32, and values that are too large become infinite."""
    with np.errstate(over="ignore"):
        values = vectors.astype(stored_dtype(vectors.dtype.name), copy=False)
    texts = pl.Series(pl.from_arrow(ids.cast(pa.large_string())))
    return pl.DataFrame({"sample_id": texts, "embedding": pl.Series(values)})


def stored_dtype(dtype: str) -> Literal["float16", "float32"]:
    """The type in which vectors of this type are stored: that in which training holds them."""
    return "float16" if dtype == "float16" else "float32"


def inputs_of(requests: Sequence[Request], scratch: Path) -> list[Input]:
    """The files of a source. Raises a DataError if one does not exist."""
    found: list[Input] = []
    for request in requests:
        if request.ids:
            found += [NumpyPair(vectors, ids, scratch) for vectors, ids in pairs(request)]
        else:
            found += [ParquetFile(file) for file in files(request.vectors)]
    return found


def first_kind(name: str, inputs: Iterable[Input]) -> Kind:
    """Length and type of the first vector of a source. Raises a DataError if no file has a vector."""
    kinds = (one.kind() for one in inputs)
    found = next((kind for kind in kinds if kind), None)
    if found is None:
        urls = ", ".join(file.url for one in inputs for file in one.files)
        raise DataError(f"source {name!r} has no vectors: {urls}", "write the embeddings again")
    return found


def large_batches(inputs: Iterable[Input], kind: Kind) -> Iterator[pl.DataFrame]:
    """All ids and vectors of a source, in batches of about `BATCH_BYTES`."""
    waiting, size = list[pl.DataFrame](), 0
    for batch in (batch for one in inputs for batch in one.batches(kind)):
        waiting.append(batch)
        size += int(batch.estimated_size())
        if size >= BATCH_BYTES:
            yield pl.concat(waiting)
            waiting, size = [], 0
    if waiting:
        yield pl.concat(waiting)


def entries_of(inputs: Iterable[Input]) -> list[Entry]:
    return [file for one in inputs for file in one.files]
