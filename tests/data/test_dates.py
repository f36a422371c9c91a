"""Dates in tables: every format gives the same timestamps, and other values are errors that name their rows."""

from __future__ import annotations

import datetime

import pandas as pd
import pytest

from fusion.data.dates import timestamp, timestamps
from fusion.errors import DataError


def column(values: list[object], dtype: str | None = "str") -> pd.Series:
    ids = pd.Index([f"id{i}" for i in range(len(values))], name="sample_id")
    return pd.Series(values, index=ids, name="created", dtype=dtype)


FORMS = {
    "ISO dates": column(["2026-01-31", "2025-12-01"]),
    "times and zones, mixed": column(["2026-01-31T02:00:00+02:00", " 2025-12-01 "]),
    "zone Z and space": column(["2026-01-31 00:00:00.000Z", "2025-12-01"]),
    "day first": column(["31/01/2026", "01/12/2025"]),
    "month first": column(["01/31/2026", "12/01/2025"]),
    "in words": column(["31 January 2026", "1 December 2025"]),
    "digits": column(["20260131", "20251201"]),
    "whole numbers": column([20260131, 20251201], "int64"),
    "timestamps": column(["2026-01-31", "2025-12-01"]).astype("datetime64[ns]"),
    "timestamps with a zone": pd.to_datetime(
        column(["2026-01-31T05:30+05:30", "2025-12-01T05:30+05:30"])
    ).dt.tz_convert("Asia/Kolkata"),
    "dates of Parquet": column([datetime.date(2026, 1, 31), datetime.date(2025, 12, 1)], "object"),
}


@pytest.mark.parametrize("form", FORMS)
def test_formats_of_the_same_dates_give_the_same_timestamps(form: str) -> None:
    found = timestamps(FORMS[form], "--validate-after")
    assert [str(one) for one in found] == ["2026-01-31 00:00:00+00:00", "2025-12-01 00:00:00+00:00"]


def test_rejects_ambiguous_dates() -> None:
    with pytest.raises(DataError, match="such as 03/04/2026 are ambiguous") as caught:
        timestamps(column(["05/05/2026", "03/04/2026"]), "--validate-after")
    assert "YYYY-MM-DD" in caught.value.remedy


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (["2026-01-31", "", "2026-01-30"], "str", "1 of 3 rows have no date in 'created', the first: id1"),
        (["2026-01-31", None], "str", "1 of 2 rows have no date in 'created', the first: id1"),
        (["", ""], "str", "2 of 2 rows have no date"),
        (["2026-01-31", "soon"], "str", r"'created' has values that are not dates, the first: soon \(id1\)"),
        (["2026-01-31", "", "2026-13-01"], "str", r"the first: 2026-13-01 \(id2\)"),
        ([1.5, 2.5], "float64", r"the first: 1.5 \(id0\)"),
        ([True, False], "bool", r"the first: True \(id0\)"),
        ([1700000000], "int64", r"the first: 1700000000 \(id0\)"),
    ],
)
def test_rejects_values_that_are_not_dates(values: list[object], dtype: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        timestamps(column(values, dtype), "--validate-after")
    assert "--validate-after" in caught.value.remedy


def test_a_timestamp_is_in_utc() -> None:
    assert str(timestamp("2026-01-31")) == "2026-01-31T00:00:00.000000"
    assert timestamp("2026-01-31T00:00+02:00") == timestamp("2026-01-30T22:00Z")
