from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion.errors import DataError
from fusion.tables import Table, read_table

GOOD = 'sample_id,price,title\n7,3.5,x\n007,20,"a,b"\nb,1e2,NA\n'


def read(folder: Path, text: str | bytes, *, priced: bool = True, drop_bad_prices: bool = False) -> Table:
    (folder / "train.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return read_table(str(folder), "train", priced=priced, drop_bad_prices=drop_bad_prices)


def test_rows_are_sorted_by_id_and_remember_their_order(tmp_path: Path) -> None:
    table = read(tmp_path, GOOD)
    assert table.ids.tolist() == ["007", "7", "b"]
    assert table.prices.tolist() == [20.0, 3.5, 100.0]
    assert table.ids[table.file_order].tolist() == ["7", "007", "b"]
    assert table.frame["title"].tolist() == ["a,b", "x", "NA"]


def test_the_order_of_the_file_changes_nothing_else(tmp_path: Path) -> None:
    lines = GOOD.splitlines()
    first, second = read(tmp_path, GOOD), read(tmp_path, "\n".join([lines[0], *lines[:0:-1]]))
    pd.testing.assert_frame_equal(first.frame, second.frame)


def test_parquet_with_numbers_as_ids(tmp_path: Path) -> None:
    pd.DataFrame({"sample_id": [10, 9], "price": [1, 2]}).to_parquet(tmp_path / "train.parquet")
    table = read_table(str(tmp_path), "train", priced=True)
    assert table.ids.tolist() == ["10", "9"]
    assert table.prices.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read: the file is empty"),
        ("sample_id,price\n", "has no rows"),
        ("id,price\n1,2\n", r"no column 'sample_id'; it has \['id', 'price'\]"),
        ("sample_id,cost\n1,2\n", "no column 'price'"),
        ("sample_id,price\n1,2\n1,3\n2,1\n", r"1 ids occur more than once in .*train\.csv, the first: 1"),
        ("sample_id,price\n,2\n", "1 rows without a sample_id"),
        ("sample_id,price\n1,2\n2,3,4,5\n", "cannot be read: Error tokenizing data"),
        (b"sample_id,price\n\xff\xfe,1\n", "cannot be read"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read(tmp_path, text)


@pytest.mark.parametrize("price", ["", "nan", "inf", "0", "-3", "free"])
def test_bad_prices(tmp_path: Path, price: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"sample_id,price\n1,5\n2,{price}\n"
    with pytest.raises(DataError, match=r"1 rows .* no price above zero, the first: 2") as caught:
        read(tmp_path, text)
    assert "--drop-bad-prices" in caught.value.remedy
    assert read(tmp_path, text, drop_bad_prices=True).ids.tolist() == ["1"]
    assert "event=dropped_bad_prices rows=1" in capsys.readouterr().err


def test_a_table_without_prices_needs_none(tmp_path: Path) -> None:
    assert len(read(tmp_path, "sample_id\n2\n1\n", priced=False)) == 2


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither .*train\.csv nor train\.parquet exists"):
        read_table(str(tmp_path), "train", priced=True)


def test_positions_are_a_permutation(tmp_path: Path) -> None:
    text = "sample_id,price\n" + "".join(f"{i},1\n" for i in np.random.default_rng(0).permutation(200))
    assert sorted(read(tmp_path, text).file_order.tolist()) == list(range(200))
