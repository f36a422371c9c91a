"""Dates of a table's column, however they are written, as moments in UTC."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fusion.errors import DataError

# As written, these could be of two days: 03/04/2026 is in March in the United States, and in April elsewhere.
ORDERS = ({"dayfirst": False}, {"dayfirst": True})


def moments(column: pd.Series, flag: str) -> pd.Series:
    """[N] moments in UTC of dates or timestamps; those without a time zone are in UTC.

    ISO 8601 may be mixed with and without times and zones; of other forms that pandas reads, one for the whole column.

    Args:
        column: text, dates, timestamps or whole numbers such as 20260131; named, indexed by sample_id.
        flag: that named the column, for messages.

    Raises:
        DataError: it holds anything else, a date is missing, or its days and months cannot be told apart.
    """
    found = _parsed(column, flag)
    missing = column.index[found.isna()]
    if len(missing):
        raise DataError(
            f"{len(missing)} of {len(column)} rows have no date in {column.name!r}, the first: {_some(missing)}",
            f"fill in the dates, or name another column with {flag}",
        )
    return found


def _parsed(column: pd.Series, flag: str) -> pd.Series:
    if pd.api.types.is_integer_dtype(column.dtype):
        column = column.astype("str")
    if pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_numeric_dtype(column.dtype):
        raise _no_dates(column, column.index[:5], flag)
    values = column.str.strip() if isinstance(column.dtype, pd.StringDtype) else column
    iso = _read(values, {"format": "ISO8601"})
    if iso is not None:
        return iso
    readings = [reading for order in ORDERS if (reading := _read(values, order)) is not None]
    if not readings:
        unread = pd.to_datetime(values, utc=True, format="ISO8601", errors="coerce").isna() & values.notna()
        raise _no_dates(column, column.index[unread & (values != "")][:5], flag)
    if not readings[0].equals(readings[-1]):
        first = column[(readings[0] != readings[-1]).to_numpy()].iloc[0]
        raise DataError(
            f"dates in {column.name!r} such as {first} may begin with the day or with the month",
            f"write them as YYYY-MM-DD, or name another column with {flag}",
        )
    return readings[0]


def _read(values: pd.Series, how: Mapping[str, Any]) -> pd.Series | None:
    """The moments; None if some of the values are none in this form."""
    try:
        with warnings.catch_warnings():  # pandas warns that it reads what it was not told to expect
            warnings.simplefilter("ignore", UserWarning)
            return pd.to_datetime(values, utc=True, **how)
    except (ValueError, TypeError, OverflowError):
        return None


def _no_dates(column: pd.Series, ids: pd.Index, flag: str) -> DataError:
    shown = ", ".join(f"{column[one]!s:.40} ({one})" for one in ids)
    return DataError(
        f"{column.name!r} holds other values than dates, the first: {shown}",
        f"write dates as YYYY-MM-DD, or name another column with {flag}",
    )


def _some(ids: pd.Index) -> str:
    return ", ".join(ids[:5])


def moment(text: str) -> np.datetime64:
    """The moment in UTC of an ISO date or timestamp, as `moments` reads them."""
    found: np.datetime64 = pd.to_datetime(pd.Series([text]), utc=True, format="ISO8601").to_numpy("datetime64[us]")[0]
    return found
