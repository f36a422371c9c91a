"""`train.csv` and `test.csv` (or Parquet): ids, prices and the columns to group by, checked, sorted by id."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fusion import log, storage
from fusion.errors import DataError
from fusion.inputs import find_table


@dataclass(frozen=True)
class Table:
    """Rows sorted by `sample_id`, so that the order of the file changes nothing but the order of a submission.

    Attributes:
        frame: one row a sample, index `sample_id` (text, as written), price as float64 where the table has prices.
        file_order: [N] positions in `frame` of the rows as the file orders them.
    """

    frame: pd.DataFrame
    file_order: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def ids(self) -> pd.Index:
        return self.frame.index

    @property
    def prices(self) -> np.ndarray:
        """[N] float64, dollars."""
        return self.frame["price"].to_numpy(np.float64)


def read_table(data: str, split: str, *, priced: bool, drop_bad_prices: bool = False) -> Table:
    """The table of a split.

    Raises:
        DataError: no such file, unreadable, a column missing, ids empty or twice, prices missing or not positive.
    """
    url = find_table(data, split)
    frame = _parse(url, storage.read(url))
    for column in ("sample_id", "price") if priced else ("sample_id",):
        if column not in frame.columns:
            raise DataError(f"{url} has no column {column!r}; it has {list(frame.columns)}", "add or rename the column")
    frame["sample_id"] = frame["sample_id"].astype("str")
    _check_ids(url, frame["sample_id"])
    if priced:
        frame = _check_prices(url, frame, drop_bad_prices)
    if frame.empty:
        raise DataError(f"{url} has no rows", "write at least one row with a sample_id")
    order = np.argsort(frame["sample_id"].to_numpy(dtype=object), kind="stable")
    file_order = np.empty_like(order)
    file_order[order] = np.arange(len(order))
    return Table(frame.iloc[order].set_index("sample_id"), file_order)


def _parse(url: str, content: bytes) -> pd.DataFrame:
    try:
        if url.endswith(".parquet"):
            return pd.read_parquet(io.BytesIO(content))
        # Text as written: an id such as 007 stays 007, and the text "NA" is a text.
        frame = pd.read_csv(io.BytesIO(content), dtype="str", keep_default_na=False)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parse errors are ValueErrors
        reason = str(error).splitlines()[0] if content else "the file is empty"
        raise DataError(f"{url} cannot be read: {reason}", "write it again as UTF-8 CSV or as Parquet") from error
    return frame


def _check_ids(url: str, ids: pd.Series) -> None:
    empty = int((ids.isna() | ids.isin(["", "nan", "None", "<NA>"])).sum())
    if empty:
        raise DataError(f"{url} has {empty} rows without a sample_id", "give every row an id")
    report_duplicates(url, pd.Index(ids))


def report_duplicates(origin: str, ids: pd.Index) -> None:
    """Raises a DataError that counts and names ids that occur more than once."""
    twice = ids[ids.duplicated()].unique()
    if len(twice):
        raise DataError(
            f"{len(twice)} ids occur more than once in {origin}, the first: {', '.join(twice[:5])}",
            "keep one row for each id",
        )


def _check_prices(url: str, frame: pd.DataFrame, drop: bool) -> pd.DataFrame:
    prices = pd.to_numeric(frame["price"], errors="coerce").astype(np.float64)
    bad = ~(np.isfinite(prices) & (prices > 0))
    if bad.any() and not drop:
        shown = ", ".join(f"{row.sample_id} ({row.price!r})" for row in frame[bad].head(5).itertuples())
        raise DataError(
            f"{int(bad.sum())} rows of {url} have no price above zero, the first: {shown}",
            "correct them, or drop them with --drop-bad-prices",
        )
    if bad.any():
        log.warning(event="dropped_bad_prices", rows=int(bad.sum()), file=url)
    return frame.assign(price=prices)[~bad]
