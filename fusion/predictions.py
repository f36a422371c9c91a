"""`predictions.parquet` of a submission: each price with what else the model says of the row.

Columns beside sample_id and price are whatever the model computes per row: numbers, or lists of one length.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 65_536  # a reader needs one group at a time in memory: 5 MB for 10 columns


def to_parquet(ids: Sequence[str], columns: Mapping[str, np.ndarray]) -> bytes:
    """The rows as Parquet: sample_id, then the columns in their order; the same bytes for the same rows.

    Args:
        columns: name to [n], or to [n, K], which becomes a list of K in every row.
    """
    table = pa.table({"sample_id": pa.array(ids, pa.string())} | {name: _array(one) for name, one in columns.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=ROWS_PER_GROUP)
    return buffer.getvalue()


def _array(values: np.ndarray) -> pa.Array:
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
