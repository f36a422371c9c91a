"""Parses a table's column of dates or timestamps into UTC timestamps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fusion.errors import DataError

# Arguments of `pd.to_datetime` for the two readings of a date such as 03/04/2026: in March, as in the United States, or
# in April, as in most other countries.
ORDERS = ({"dayfirst": False}, {"dayfirst": True})


def timestamps(column: pd.Series, flag: str) -> pd.Series:
    """[N] UTC timestamps of a column of dates or timestamps. Values without a time zone are taken as UTC.

    Values in ISO 8601 may differ in whether they have a time and a zone. Any other format that pandas can parse must be
    the same in the whole column.

    Args:
        column: text, dates, timestamps or integers such as 20260131, with a name, indexed by sample_id.
        flag: the flag that named the column, for messages.

    Raises:
        DataError: a value is not a date, a date is missing, or day and month cannot be distinguished.
    """
    found = _parsed(column, flag)
    missing = column.index[found.isna()]
    if len(missing):
        raise DataError(
            f"{len(missing)} of {len(column)} rows have no date in {column.name!r}, the first: {_some(missing)}",
            f"add the missing dates, or name another column with {flag}",
        )
    return found


def _parsed(column: pd.Series, flag: str) -> pd.Series:
    if pd.api.types.is_integer_dtype(column.dtype):
        column = column.astype("str")
    if pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_numeric_dtype(column.dtype):
        raise _not_dates(column, column.index[:5], flag)
    values = column.str.strip() if isinstance(column.dtype, pd.StringDtype) else column
    iso = _read(values, {"format": "ISO8601"})
    if iso is not None:
        return iso
    # Not ISO 8601: accept the column if only one order of day and month is possible, or both give the same dates.
    readings = [reading for order in ORDERS if (reading := _read(values, order)) is not None]
    if not readings:
        unread = pd.to_datetime(values, utc=True, format="ISO8601", errors="coerce").isna() & values.notna()
        raise _not_dates(column, column.index[unread & (values != "")][:5], flag)
    if not readings[0].equals(readings[-1]):
        first = column[(readings[0] != readings[-1]).to_numpy()].iloc[0]
        raise DataError(
            f"dates in {column.name!r} such as {first} are ambiguous: the day or the month may come first",
            f"write them as YYYY-MM-DD, or name another column with {flag}",
        )
    return readings[0]


def _read(values: pd.Series, how: Mapping[str, Any]) -> pd.Series | None:
    """The timestamps; None if some of the values cannot be parsed in this way."""
    try:
        with warnings.catch_warnings():  # pandas warns when it has to guess the format
            warnings.simplefilter("ignore", UserWarning)
            return pd.to_datetime(values, utc=True, **how)
    except (ValueError, TypeError, OverflowError):
        return None


def _not_dates(column: pd.Series, ids: pd.Index, flag: str) -> DataError:
    shown = ", ".join(f"{column[one]!s:.40} ({one})" for one in ids)  # 40 characters, so that the line stays readable
    return DataError(
        f"{column.name!r} has values that are not dates, the first: {shown}",
        f"write dates as YYYY-MM-DD, or name another column with {flag}",
    )


def _some(ids: pd.Index) -> str:
    return ", ".join(ids[:5])


def timestamp(text: str) -> np.datetime64:
    """The UTC timestamp of an ISO date or timestamp, parsed as in `timestamps`."""
    found: np.datetime64 = pd.to_datetime(pd.Series([text]), utc=True, format="ISO8601").to_numpy("datetime64[us]")[0]
    return found
