"""Checks ids and vectors, of an array or of a list, and pairs them by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fusion.convert import safe_pickle
from fusion.errors import DataError

ROW_GROUP: Final = 8192  # rows per row group of Parquet: enough for few requests, few enough to read in parallel
CHUNK_IDS: Final = 1 << 16  # texts converted at a time
_STACK_IDS: Final = "save the ids as one array of integers, or of text: np.save('ids.npy', ids.astype(str))"
PAIR: Final = "give embeddings and ids that were written together"
_STACK_ROWS: Final = "save the embeddings as one array of float16 or float32 with one row per sample"


@dataclass(frozen=True)
class Embeddings:
    """Ids with their vectors.

    Attributes:
        ids: [n] int64 or string.
        vectors: an array of shape (n, dim), or a list of n arrays of length dim.
        dtype: in which the vectors are stored.
    """

    ids: pa.Array
    vectors: NDArray[Any] | list[NDArray[Any]]
    dim: int
    dtype: np.dtype[Any]

    def batch(self, start: int) -> pa.RecordBatch:
        """A row group's rows from `start` on. DataError if a float64 is too large for float32."""
        rows = slice(start, start + ROW_GROUP)
        try:
            with np.errstate(over="raise"):  # training would treat an infinite value as a missing embedding
                values = np.ascontiguousarray(self.vectors[rows], dtype=self.dtype)
        except FloatingPointError:
            raise DataError(f"a value from row {start} on is too large for float32", "scale the embeddings") from None
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self.dim)
        return pa.record_batch([self.ids[rows], column], names=["sample_id", "embedding"])


def embeddings_of(vectors: object, ids: object, name: str, ids_name: str) -> Embeddings:
    """Checks vectors and ids, and pairs them by position. `name` and `ids_name` are their names in errors.

    Raises:
        DataError: one of them is invalid, or their numbers differ.
    """
    id_column = ids_of(ids, ids_name)
    rows, dtypes, dim = rows_of(vectors, name)
    if len(rows) != len(id_column):
        raise DataError(f"{name} has {len(rows)} rows, {ids_name} has {len(id_column)} ids", PAIR)
    found = np.result_type(*dtypes)
    return Embeddings(id_column, rows, dim, np.dtype(np.float16 if found == np.float16 else np.float32))


def rows_of(value: object, name: str) -> tuple[NDArray[Any] | list[NDArray[Any]], set[np.dtype[Any]], int]:
    """Vectors, their dtypes and their length, from an array (n, dim) or a list of n vectors or of batches (b, dim)."""
    value = safe_pickle.unwrap(value, name)
    if not isinstance(value, list):
        array = _numeric(value, name, n_dims=(2,))
        return array, {array.dtype}, array.shape[1]
    if not value:
        raise DataError(f"{name} is empty", _STACK_ROWS)
    rows = [row for i, item in enumerate(value) for row in _vectors(item, f"{name}[{i}]")]
    dim = len(rows[0])
    ragged = next((i for i, row in enumerate(rows) if len(row) != dim), None)
    if ragged is not None:
        raise DataError(f"{name}: row 0 has length {dim}, row {ragged} has {len(rows[ragged])}", _STACK_ROWS)
    return rows, {row.dtype for row in rows}, dim


def _vectors(item: object, name: str) -> NDArray[Any]:
    return np.atleast_2d(_numeric(safe_pickle.unwrap(item, name), name, n_dims=(1, 2)))


def _numeric(value: object, name: str, n_dims: tuple[int, ...]) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError:  # numpy on nested lists of unequal lengths
        raise DataError(f"{name} is ragged: its rows have different lengths", _STACK_ROWS) from None
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} has dtype {array.dtype}, expected numbers", _STACK_ROWS)
    if array.ndim not in n_dims or 0 in array.shape:
        expected = "(rows, dim)" if n_dims == (2,) else "(dim,) or (rows, dim)"
        raise DataError(f"{name} has shape {array.shape}, expected {expected} without a 0", _STACK_ROWS)
    return array


def ids_of(value: object, name: str) -> pa.Array:
    """Ids as int64 or string, from an array of shape (n,) or (n, 1), or from a list.

    Raises:
        DataError: they are not integers or text, or an id occurs twice.
    """
    ids = id_column(value, name)
    _require_unique(ids, name)
    return ids


def id_column(value: object, name: str) -> pa.Array:
    """As `ids_of`, but ids may occur more than once."""
    value = safe_pickle.unwrap(value, name)
    if not isinstance(value, np.ndarray | list | tuple):
        raise DataError(f"{name} is a {type(value).__name__}, expected a list or an array of ids", _STACK_IDS)
    try:
        return _id_array(value, name) if isinstance(value, np.ndarray) else _id_list(value, name)
    except (OverflowError, UnicodeError, pa.ArrowException) as error:
        raise DataError(f"{name} has an id that is neither int64 nor UTF-8 text ({error})", _STACK_IDS) from None


def _id_array(array: NDArray[Any], name: str) -> pa.Array:
    if array.shape not in ((array.size,), (array.size, 1)):
        raise DataError(f"{name} has shape {array.shape}, expected (rows,)", _STACK_IDS)
    if array.dtype.kind not in "iuUS":
        raise DataError(f"{name} has dtype {array.dtype}, expected integers or text", _STACK_IDS)
    flat = np.char.decode(array.ravel(), "utf-8") if array.dtype.kind == "S" else array.ravel()
    if flat.dtype.kind == "U":
        return _texts(flat)
    return pa.array(flat.astype(flat.dtype.newbyteorder("="))).cast(pa.int64())  # raises where uint64 does not fit


def _texts(values: NDArray[Any]) -> pa.Array:
    """The texts as Arrow; block by block, because a Python object for each id needs several times the memory."""
    blocks = (values[start : start + CHUNK_IDS] for start in range(0, len(values), CHUNK_IDS))
    return pa.concat_arrays([pa.array([], pa.string()), *(pa.array(block.tolist(), pa.string()) for block in blocks)])


def _id_list(values: Sequence[object], name: str) -> pa.Array:
    ids = [_id_scalar(value, name) for value in values]
    kinds = [type(value) for value in ids]
    odd = next((i for i, kind in enumerate(kinds) if kind not in (int, str) or kind is not kinds[0]), None)
    if odd is not None:
        raise DataError(f"{name}[{odd}] is a {kinds[odd].__name__}, expected only integers or only text", _STACK_IDS)
    return pa.array(ids, pa.string() if str in kinds else pa.int64())


def _id_scalar(value: object, name: str) -> object:
    """The id of an element: `tensor(1)` and `array([1])` give 1, rather than the text of their repr."""
    value = safe_pickle.unwrap(value, name)
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


def _require_unique(ids: pa.Array, name: str) -> None:
    counts = ids.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        first = ", ".join(str(value) for value in repeated[:5].to_pylist())
        raise DataError(f"{name} has {len(repeated)} ids more than once, first {first}", "keep one row for each id")
