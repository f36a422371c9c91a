"""Embeddings that are in memory already: checks arrays, and aligns them with the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fusion.data.embeddings import store_vectors
from fusion.data.row_store import RowStore, SourceArrays
from fusion.data.source_rows import Rows
from fusion.data.table_file import id_texts
from fusion.data.tables import Table, report_duplicates
from fusion.errors import DataError

ID = "sample_id"
NO_VECTOR = -1  # the position of the vector of a row that has none
_RESHAPE = "give one vector per row as an array of shape [rows, dimensions], or as a pair (ids, array)"


@dataclass(frozen=True)
class Vectors:
    """The vectors of a role, and which row of a table has which of them.

    Attributes:
        values: [M, D] float16, float32 or float64, or integers; NaN in the rows that have no vector.
        positions: [N] for each row of the table, in the table's order, the position of its vector; `NO_VECTOR` if it
            has none.
        ids: [M] large_string, the id of each vector.
    """

    values: np.ndarray
    positions: np.ndarray
    ids: pa.Array

    @property
    def dim(self) -> int:
        return int(self.values.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """As which they are stored: float16 stays float16, everything else becomes float32, as from a file."""
        return torch.float16 if self.values.dtype == np.float16 else torch.float32


def aligned(given: Any, role: str, table: Table, rows_name: str) -> Vectors:
    """Checks what was given for a role, and aligns it with the rows of the table.

    Args:
        given: an array [N, D] in the order of the table's file; a pair of ids [M] and an array [M, D]; a mapping from
            id to vector; or a frame with sample_id, as a column or the index, and with embedding, or a column per
            number. Arrays may be of NumPy, torch, pyarrow or polars, or lists of vectors; None in a list counts as
            missing.
        rows_name: what the rows of the table are called in messages.

    Raises:
        DataError: it is none of these, its vectors are ragged or not numbers, their number differs from the number of
            ids or rows, or an id occurs twice.
    """
    ids, vectors = _ids_and_vectors(given, role)
    values = matrix_of(vectors, role)
    if ids is not None:
        return _joined(ids, values, role, table)
    if len(values) != len(table):
        raise DataError(f"{role} has {len(values)} vectors, and {rows_name} has {len(table)} rows", _RESHAPE)
    positions = np.empty(len(table), np.int64)
    positions[table.file_order] = np.arange(len(table))
    in_file_order = pa.array(table.ids[table.file_order], pa.large_string(), from_pandas=True)
    return Vectors(values, positions, in_file_order)


def _ids_and_vectors(given: Any, role: str) -> tuple[Any, Any]:
    """What was given, as ids and vectors; the ids are None if it has none."""
    if isinstance(given, tuple) and len(given) == 2:
        return given
    if hasattr(given, "to_arrow"):  # of polars
        given = given.to_arrow()
    if isinstance(given, pa.Table):
        given = given.to_pandas()
    if isinstance(given, pd.Series) and given.index.name == ID:
        return given.index, given
    if isinstance(given, pd.DataFrame):
        return _columns_of(given, role)
    if isinstance(given, Mapping):
        return list(given), list(given.values())
    return None, given


def _columns_of(frame: pd.DataFrame, role: str) -> tuple[Any, Any]:
    """Ids and vectors of a frame; the ids are None if it has only numbers."""
    has_vectors = "embedding" in frame
    if ID in frame:
        return frame[ID], frame["embedding"] if has_vectors else frame.drop(columns=ID)
    if frame.index.name == ID:
        return frame.index, frame["embedding"] if has_vectors else frame
    if has_vectors:
        raise DataError(f"{role} is a frame without the column {ID}", "add the ids, or give an array")
    return None, frame


def _joined(ids: Any, values: np.ndarray, role: str, table: Table) -> Vectors:
    """Vectors that come with ids, in any order; ids that the table does not have are ignored."""
    texts = texts_of_ids(ids, f"the ids of {role}")
    if len(texts) != len(values):
        raise DataError(f"{role} has {len(values)} vectors and {len(texts)} ids", _RESHAPE)
    report_duplicates(f"the ids of {role}", texts)
    found = Rows(table.ids).find(texts)
    positions = np.full(len(table), NO_VECTOR, np.int64)
    known = found.rows >= 0
    positions[found.rows[known]] = np.flatnonzero(known)
    return Vectors(values, positions, texts.combine_chunks())


def texts_of_ids(ids: Any, name: str) -> pa.ChunkedArray:
    """Ids [M] as large_string; `name` names them in messages.

    Raises:
        DataError: they are neither whole numbers nor text, or one is missing.
    """
    array = as_arrow(ids, name)
    texts = id_texts(name, array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array]))
    if texts.null_count:
        raise DataError(f"{name} have {texts.null_count} without a value", "give every vector an id")
    return texts


def as_arrow(values: Any, name: str) -> pa.Array | pa.ChunkedArray:
    """Values [M] of one type as Arrow; DataError if they are of several types."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    try:
        return pa.array(values.to_numpy() if isinstance(values, pd.Index) else values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{name} cannot be read: {str(error).splitlines()[0]}", "use values of one type") from error


def matrix_of(vectors: Any, role: str) -> np.ndarray:
    """The vectors as one array [M, D] of numbers, with NaN for vectors that are None.

    Raises:
        DataError: they are not numbers, or of several lengths.
    """
    if hasattr(vectors, "to_arrow"):
        vectors = vectors.to_arrow()
    if isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().cpu()
        vectors = (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()  # NumPy has no bfloat16
    elif isinstance(vectors, pa.Array | pa.ChunkedArray):
        vectors = _of_lists(vectors)
    elif isinstance(vectors, pd.DataFrame):
        vectors = vectors.to_numpy()
    if not isinstance(vectors, np.ndarray) or vectors.dtype == object:
        vectors = _stacked(list(vectors) if isinstance(vectors, pd.Series) else vectors, role)
    if vectors.ndim != 2 or vectors.shape[1] == 0 or vectors.dtype.kind not in "fiu":
        found = f"an array of shape {list(vectors.shape)} and type {vectors.dtype}"
        raise DataError(f"{role} is {found}, expected numbers of shape [rows, dimensions]", _RESHAPE)
    found_values: np.ndarray = vectors.astype(np.float32) if vectors.dtype.kind in "iu" else vectors
    return found_values


def _of_lists(column: pa.Array | pa.ChunkedArray) -> Any:
    """Lists of Arrow as an array [M, D] if all have one length, else as a list of arrays."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kinds = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    if not any(is_kind(column.type) for is_kind in kinds):
        return column.to_numpy(zero_copy_only=False)
    is_fixed = pa.types.is_fixed_size_list(column.type)
    if len(column) and not column.null_count and (is_fixed or len(pc.unique(pc.list_value_length(column))) == 1):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return [None if one.as_py() is None else one.values.to_numpy(zero_copy_only=False) for one in column]


def _stacked(vectors: Any, role: str) -> np.ndarray:
    """Vectors in a sequence as one array; NaN where one is missing."""
    if not isinstance(vectors, Sequence | np.ndarray) or isinstance(vectors, str):
        raise DataError(f"{role} is a {type(vectors).__name__}, expected vectors", _RESHAPE)
    rows = [None if _is_missing(row) else _row(row, role) for row in vectors]
    there = [row for row in rows if row is not None]
    lengths = {len(row) for row in there}
    if len(lengths) != 1:
        found = f"vectors of {' and of '.join(map(str, sorted(lengths)))} numbers" if lengths else "no vectors"
        raise DataError(f"{role} has {found}", "give vectors of one length")
    kind = np.result_type(*{row.dtype for row in there})
    if kind.kind not in "fiu":
        raise DataError(f"{role} has vectors of {kind}, expected numbers", _RESHAPE)
    stacked = np.full((len(rows), lengths.pop()), np.nan, kind if kind.kind == "f" else np.float32)
    for position, row in enumerate(rows):
        if row is not None:
            stacked[position] = row
    return stacked


def _is_missing(row: Any) -> bool:
    """Whether there is None, pd.NA or NaN in place of a vector, as after `Series.reindex`."""
    return row is None or row is pd.NA or (isinstance(row, float) and np.isnan(row))


def _row(row: Any, role: str) -> np.ndarray:
    try:
        found = row.detach().cpu().float().numpy() if isinstance(row, torch.Tensor) else np.asarray(row)
    except ValueError as error:
        raise DataError(f"{role} has a ragged vector: {error}", "give vectors of one length") from error
    if found.ndim != 1:
        raise DataError(f"{role} has a vector of shape {list(found.shape)}", _RESHAPE)
    return found


def row_store(vectors: Mapping[str, Vectors | None], dims: Mapping[str, int], first: int, end: int) -> RowStore:
    """The rows [first, end) of a table, with the vectors of each role, as they would be read from files.

    Vectors that are not finite, and vectors of zeros, count as missing.

    Args:
        vectors: role to its vectors; None: no row has the role.
        dims: role to the dimension of a role that no row has.
    """
    arrays = {}
    for role, one in vectors.items():
        dim, dtype = (dims[role], torch.float32) if one is None else (one.dim, one.dtype)
        n_rows = end - first
        present, zeros, known = (torch.zeros(n_rows, dtype=torch.bool) for _ in range(3))
        arrays[role] = SourceArrays(torch.zeros((n_rows, dim), dtype=dtype), present, zeros, known)
        if one is not None:
            _fill(arrays[role], one, one.positions[first:end])
    return RowStore.of(arrays)


def _fill(arrays: SourceArrays, vectors: Vectors, positions: np.ndarray) -> None:
    rows = np.flatnonzero(positions != NO_VECTOR)
    arrays.known.numpy()[rows] = True
    if len(rows):
        store_vectors(vectors.values[positions[rows]], rows, arrays)
