"""Dates as tables have them: read alike however they are written, or refused with the rows that are wrong."""

from __future__ import annotations

import datetime

import pandas as pd
import pytest

from fusion.data.dates import moment, moments
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
def test_a_date_is_the_same_however_it_is_written(form: str) -> None:
    found = moments(FORMS[form], "--validate-after")
    assert [str(one) for one in found] == ["2026-01-31 00:00:00+00:00", "2025-12-01 00:00:00+00:00"]


def test_a_day_that_could_be_a_month_is_refused() -> None:
    with pytest.raises(DataError, match="such as 03/04/2026 may begin with the day or with the month") as caught:
        moments(column(["05/05/2026", "03/04/2026"]), "--validate-after")
    assert "YYYY-MM-DD" in caught.value.remedy


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (["2026-01-31", "", "2026-01-30"], "str", "1 of 3 rows have no date in 'created', the first: id1"),
        (["2026-01-31", None], "str", "1 of 2 rows have no date in 'created', the first: id1"),
        (["", ""], "str", "2 of 2 rows have no date"),
        (["2026-01-31", "soon"], "str", r"'created' holds other values than dates, the first: soon \(id1\)"),
        (["2026-01-31", "", "2026-13-01"], "str", r"the first: 2026-13-01 \(id2\)"),
        ([1.5, 2.5], "float64", r"the first: 1.5 \(id0\)"),
        ([True, False], "bool", r"the first: True \(id0\)"),
        ([1700000000], "int64", r"the first: 1700000000 \(id0\)"),
    ],
)
def test_other_values_are_named(values: list[object], dtype: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        moments(column(values, dtype), "--validate-after")
    assert "--validate-after" in caught.value.remedy


def test_a_moment_is_in_utc() -> None:
    assert str(moment("2026-01-31")) == "2026-01-31T00:00:00.000000"
    assert moment("2026-01-31T00:00+02:00") == moment("2026-01-30T22:00Z")
