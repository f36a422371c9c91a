"""Reads and writes `predictions.parquet` of a submission: each price with everything else that was computed per row.

The columns after sample_id and price depend on the model: bounds of prediction intervals, the spread, and the
comparable products. Each is a column of numbers, or of lists that all have the same length.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# Columns with the training rows that weigh most in a price, their prices and their weights.
COMPARABLES = ("comparable_ids", "comparable_prices", "comparable_weights")
ROUNDING = 1e-4  # weights are rounded to float32, so that the sum of a row's weights may exceed 1 by so much
ROWS_PER_GROUP = 65_536  # rows that the writer and readers hold in memory at a time: about 5 MB for 10 columns


def to_parquet(n_rows: int, rows_of: Callable[[slice], Mapping[str, Any]]) -> bytes:
    """The rows as Parquet; the same rows always give the same bytes.

    Args:
        n_rows: number of rows, at least one.
        rows_of: returns the columns of a slice of n rows: sample_id, a sequence of n texts, and further columns, which
            are [n], or [n, K] for a column of lists of K. It is called for one group of rows after the other, so that
            all rows are never in memory at once.
    """
    buffer, writer = io.BytesIO(), None
    for start in range(0, n_rows, ROWS_PER_GROUP):
        rows = rows_of(slice(start, start + ROWS_PER_GROUP))
        table = pa.table({name: _array(values) for name, values in rows.items()})
        writer = writer or pq.ParquetWriter(buffer, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return buffer.getvalue()


def _array(values: Any) -> pa.Array:
    """A column for Parquet: texts, numbers [n], or lists [n, K]."""
    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.string())
    if values.ndim == 1:
        return pa.array(values)
    n_rows, length = values.shape
    offsets = pa.array(np.arange(n_rows + 1) * length, pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(values.reshape(-1)))


def from_parquet(data: bytes) -> pd.DataFrame:
    """Reads the rows that `to_parquet` wrote.

    Raises:
        ValueError: the bytes are not a Parquet file, or sample_id or price is missing.
    """
    try:
        frame = pd.read_parquet(io.BytesIO(data))
        return frame.astype({"sample_id": "str", "price": np.float64})
    except (OSError, KeyError, TypeError) as error:  # pyarrow's errors are subclasses of these or of ValueError
        raise ValueError(str(error)) from error


def misnamed(rows: pd.DataFrame) -> int:
    """Number of rows whose comparable products cannot be right.

    A row is right if its products differ from each other, their prices are finite and above 0, and their weights are
    in descending order, not negative, and add up to at most 1.

    Raises:
        KeyError, ValueError: a column of `COMPARABLES` is missing, or rows have different numbers of products.
    """
    ids, prices, weights = (np.stack(rows[name].to_list()) for name in COMPARABLES)
    codes = np.sort(pd.factorize(ids.ravel())[0].reshape(ids.shape), axis=1)
    is_right = (np.diff(codes, axis=1) != 0).all(1)
    is_right &= (np.isfinite(prices) & (prices > 0)).all(1)
    is_right &= (weights >= 0).all(1)
    is_right &= (np.diff(weights, axis=1) <= 0).all(1)
    is_right &= weights.sum(1) <= 1 + ROUNDING
    return int((~is_right).sum())
