"""`predictions.parquet` of a submission: each price with what else the model says of the row.

Columns beside sample_id and price are whatever the model computes per row: numbers, or lists of one length.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

COMPARABLES = ("comparable_ids", "comparable_prices", "comparable_weights")  # the products that a price leans on
ROUNDING = 1e-4  # of a sum of weights
ROWS_PER_GROUP = 65_536  # what writer and readers need in memory at a time: 5 MB for 10 columns


def to_parquet(n_rows: int, rows_of: Callable[[slice], Mapping[str, Any]]) -> bytes:
    """The rows as Parquet; the same bytes for the same rows.

    Args:
        n_rows: at least one.
        rows_of: of some consecutive rows: sample_id, texts [n], and further columns in their order: name to [n], or to
            [n, K], which becomes a list of K in every row. They are asked for as they are written.
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
    if not isinstance(values, np.ndarray):
        return pa.array(values, pa.string())
    if values.ndim == 1:
        return pa.array(values)
    n_rows, length = values.shape
    offsets = pa.array(np.arange(n_rows + 1) * length, pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(values.reshape(-1)))


def from_parquet(data: bytes) -> pd.DataFrame:
    """The rows that `to_parquet` wrote.

    Raises:
        ValueError: it is no Parquet file, or lacks sample_id or price.
    """
    try:
        frame = pd.read_parquet(io.BytesIO(data))
        return frame.astype({"sample_id": "str", "price": np.float64})
    except (OSError, KeyError, TypeError) as error:  # pyarrow's errors are among them
        raise ValueError(str(error)) from error


def misnamed(rows: pd.DataFrame) -> int:
    """How many rows do not name different products at prices above 0, the weightiest first, with weights of at most 1.

    Raises:
        KeyError, ValueError: a column of `COMPARABLES` is missing, or rows name more products than others.
    """
    ids, prices, weights = (np.stack(rows[name].to_list()) for name in COMPARABLES)
    codes = np.sort(pd.factorize(ids.ravel())[0].reshape(ids.shape), axis=1)
    is_right = (np.diff(codes, axis=1) != 0).all(1) & (np.isfinite(prices) & (prices > 0)).all(1)
    is_right &= (weights >= 0).all(1) & (np.diff(weights, axis=1) <= 0).all(1) & (weights.sum(1) <= 1 + ROUNDING)
    return int((~is_right).sum())
