"""Data frames as tables: what users give, as the commands read it from `train.csv` or `test.csv`, and back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pandas as pd
import pyarrow as pa

from fusion.data.tables import Table, table_of
from fusion.errors import DataError

ID = "sample_id"
NAME = "the frame"  # what the rows are called in messages


def table_from(
    frame: Any,
    *,
    priced: bool = False,
    drop_bad_prices: bool = False,
    columns: Collection[str] | None = None,
    name: str = NAME,
) -> Table:
    """The rows of a frame, checked as those of a file.

    Args:
        frame: of pandas, polars or pyarrow, with the column (or, in pandas, the index) sample_id.
        priced: whether it must have prices.
        drop_bad_prices: whether rows without a positive price are dropped instead of failing.
        columns: columns to keep beside ids and prices, if the frame has them; None: all.
        name: what the frame is called in messages.

    Raises:
        DataError: it is not a frame; ids are missing, occur twice or are neither whole numbers nor text; a column has
            values of several types; prices are missing or not positive.
    """
    kept = None if columns is None else {ID, "price", *columns}
    rows = arrow_of(frame, kept, name)
    return table_of(rows, name, priced=priced, drop_bad_prices=drop_bad_prices, columns=columns)


def arrow_of(frame: Any, columns: Collection[str] | None = None, name: str = NAME) -> pa.Table:
    """The frame as a table of Arrow, with only these columns if they are given; `name` names it in messages."""
    if hasattr(frame, "to_arrow"):  # of polars
        frame = frame.to_arrow()
    if isinstance(frame, pa.Table):
        return frame if columns is None else frame.select([one for one in frame.column_names if one in columns])
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{name} is a {type(frame).__name__}, expected a DataFrame", f"pd.DataFrame({{{ID!r}: ids}})")
    frame = with_ids(frame, name)
    if columns is not None:
        frame = frame.loc[:, [one in columns for one in frame.columns]]
    return pa.table(
        [_column(frame, number, name) for number in range(frame.shape[1])], names=list(map(str, frame.columns))
    )


def with_ids(frame: pd.DataFrame, name: str = NAME) -> pd.DataFrame:
    """The frame with a column of ids, which may be its index.

    Raises:
        DataError: it has neither.
    """
    if ID in frame.columns:
        return frame
    if frame.index.name == ID:
        return frame.reset_index()
    raise DataError(
        f"{name} has no column {ID!r}; it has {list(frame.columns)}",
        f"name the column of ids: frame.rename(columns={{'id': {ID!r}}})",
    )


def _column(frame: pd.DataFrame, number: int, name: str) -> pa.Array | pa.ChunkedArray:
    try:
        return pa.array(frame.iloc[:, number], from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"column {frame.columns[number]!r} of {name} cannot be used: {reason}", "use values of one type"
        ) from error


def in_order_of(frame: Any, predicted: pd.DataFrame) -> pd.DataFrame:
    """The predicted rows, which are in the order of the frame, with the frame's own index and ids.

    So ids that are numbers stay numbers, and columns can be assigned to the frame.
    """
    if not isinstance(frame, pd.DataFrame):
        return predicted
    if ID not in frame.columns:  # then the index has the ids
        return predicted.drop(columns=ID).set_axis(frame.index)
    return predicted.assign(**{ID: frame[ID].to_numpy()}).set_axis(frame.index)
