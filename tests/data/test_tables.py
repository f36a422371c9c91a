from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion.data import table_file
from fusion.data.tables import Table, positions_of, read_table, warn_of_poor_prices
from fusion.errors import DataError

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
        (
            "sample_id,price\n1,2\n2,3,4,5\n",
            "cannot be read: CSV parse error: Row #3: Expected 2 .*, got 4: 2,3,4,5",
        ),
        (b"sample_id,price\n\xff\xfe,1\n", "cannot be read"),
        ("sample_id;price\n1;2\n", r"columns of .*train\.csv are separated by ';', expected ','"),
        ("sample_id,price,price\n1,2,3\n", "has 2 columns 'price'"),
        ("sample_id,price\n1,2,\n2,3,x\n", "Expected 2 columns, got 3: 1,2,"),
    ],
)
def test_rejects_unreadable_tables(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read(tmp_path, text)


@pytest.mark.parametrize("price", ["", "nan", "inf", "0", "-3", "free"])
def test_bad_prices(tmp_path: Path, price: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"sample_id,price\n1,5\n2,{price}\n"
    with pytest.raises(DataError, match=r"1 of 2 rows .* no price above zero, the first: 2") as caught:
        read(tmp_path, text)
    assert "--drop-bad-prices" in caught.value.remedy
    assert read(tmp_path, text, drop_bad_prices=True).ids.tolist() == ["1"]
    assert "event=dropped_bad_prices rows=1" in capsys.readouterr().err


def test_a_price_with_a_currency_is_not_a_plain_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows .* not a plain number, the first: 2 \('\$49\.50'\)") as caught:
        read(tmp_path, "sample_id,price\n1,5\n2,$49.50\n")
    assert "plain numbers such as 12.99" in caught.value.remedy and "--drop-bad-prices" in caught.value.remedy


def test_the_hint_does_not_suggest_dropping_all_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 2 rows .* the first: 1 \('\$49\.50'\), 2 \('12,99'\)") as caught:
        read(tmp_path, 'sample_id,price\n1,$49.50\n2,"12,99"\n', drop_bad_prices=True)
    assert "--drop-bad-prices" not in caught.value.remedy and "plain numbers" in caught.value.remedy


@pytest.mark.parametrize("text", ["sample_id,price\n8,1,\n9,2,\n", "sample_id,price,,\n8,1,,\n9,2,,\n"])
def test_a_trailing_comma_in_rows_does_not_shift_columns(tmp_path: Path, text: str) -> None:
    table = read(tmp_path, text)
    assert table.ids.tolist() == ["8", "9"] and table.prices.tolist() == [1.0, 2.0]


def test_lines_in_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    table = read(tmp_path, '\ufeffsample_id,price,text\r\n1,2,"a\nb ""c"""\r\n\r\n2, 3 ,it "is" so\r\n')
    assert table.frame["text"].tolist() == ['a\nb "c"', 'it "is" so'] and table.prices.tolist() == [2.0, 3.0]


def parquet(folder: Path, **columns: pa.Array) -> Table:
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return read_table(str(folder), "train", priced=True)


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(["10", "9"], pa.string_view()),
        pa.array(["10", "9"], pa.large_string()),
        pa.array([b"10", b"9"], pa.binary()),
        pa.array(["10", "9"]).dictionary_encode(),
        pa.array([10, 9], pa.uint32()),
    ],
    ids=lambda ids: str(ids.type),
)
def test_every_kind_of_id_and_price(tmp_path: Path, ids: pa.Array) -> None:
    assert parquet(tmp_path, sample_id=ids, price=pa.array([1, 2])).ids.tolist() == ["10", "9"]
    prices = pa.array(["1.50", "2"]).cast(pa.decimal128(6, 2))
    assert parquet(tmp_path, sample_id=ids, price=prices).prices.tolist() == [1.5, 2.0]


@pytest.mark.parametrize("column", ["sample_id", "price"])
@pytest.mark.parametrize(
    "values",
    [pa.array([True, False]), pa.array([1, 2], pa.timestamp("ms")), pa.array([[1], [2]])],
    ids=["bool", "time", "list"],
)
def test_rejects_columns_of_the_wrong_type(tmp_path: Path, column: str, values: pa.Array) -> None:
    columns = {"sample_id": pa.array([1, 2]), "price": pa.array([1, 2]), column: values}
    with pytest.raises(
        DataError, match=rf"column '{column}' of .* is {str(values.type).split('<')[0].split('[')[0]}.*, expected"
    ):
        parquet(tmp_path, **columns)


def test_columns_of_lists_and_an_index_of_pandas(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"price": [1.0, 2.0], "tags": [["a"], ["b", "c"]]}, index=pd.Index(["x", "y"], name="sample_id")
    )
    frame.to_parquet(tmp_path / "train.parquet")
    table = read_table(str(tmp_path), "train", priced=True)
    assert table.ids.tolist() == ["x", "y"] and [list(tags) for tags in table.frame["tags"]] == [["a"], ["b", "c"]]


def test_only_the_columns_that_are_asked_for_are_kept(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    table = read_table(str(tmp_path), "train", priced=True, columns=["nothing"])
    assert list(table.frame.columns) == ["price"] and table.columns == ("sample_id", "price", "title")
    with pytest.raises(DataError, match="has no column 'titel'; it has") as caught:
        table.column("titel", "--by")
    assert caught.value.remedy == "did you mean title? correct --by"


def hashes(folder: Path) -> list[int]:
    table = read_table(str(folder), "train", priced=True, columns=(), hashed=["text", "other"])
    assert list(table.frame.columns) == ["price", "text"] and table.frame["text"].dtype == np.uint64
    return table.frame["text"].tolist()


def test_equal_texts_of_a_hashed_column_have_equal_hashes(tmp_path: Path) -> None:
    texts = ["a", "b", " a ", "", "漢字" * 5000]
    frame = pd.DataFrame({"sample_id": list("edcba"), "price": 1.0, "text": texts})
    frame.to_parquet(tmp_path / "train.parquet", row_group_size=2)
    found = hashes(tmp_path)
    assert found[4] == found[2] and found[1] == 0 and len(set(found)) == 4
    frame.to_csv(tmp_path / "train.csv", index=False)
    assert hashes(tmp_path) == found
    (tmp_path / "train.csv").write_text(frame.to_csv(index=False).replace("\n", ",\n").replace("text,", "text", 1))
    assert hashes(tmp_path) == found


def test_missing_numbers_have_no_hash(tmp_path: Path) -> None:
    values = pa.array([1.5, float("nan"), None, 1.5])
    table = pa.table({"sample_id": list("abcd"), "price": [1, 1, 1, 1], "text": values})
    pq.write_table(table, tmp_path / "train.parquet")
    first, *missing, last = hashes(tmp_path)
    assert first == last > 0 and missing == [0, 0]


def test_hashed_texts_are_never_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_file, "BLOCK_BYTES", 1 << 16)
    rows = "".join(f"{i},1,{'x' * 1000}\n" for i in range(5000))
    (tmp_path / "train.csv").write_text(f"sample_id,price,text\n{rows}")
    before, most = pa.total_allocated_bytes(), []
    hash_block = table_file.text_hashes

    def counted(texts: pa.ChunkedArray) -> np.ndarray:
        most.append(pa.total_allocated_bytes() - before)
        return hash_block(texts)

    monkeypatch.setattr(table_file, "text_hashes", counted)
    assert len(hashes(tmp_path)) == 5000 and len(most) > 50 and max(most) < 2 << 20, "the texts have 5 MB"


def test_positions_of_ids(tmp_path: Path) -> None:
    ids = read(tmp_path, GOOD).ids
    assert positions_of(pd.Index(["b", "x", "007"]), ids).tolist() == [2, -1, 0]
    assert positions_of(ids, pd.Index([], dtype="str")).tolist() == [-1, -1, -1]


def test_positions_of_many_ids_are_found_in_the_time_of_a_join() -> None:
    ids = pd.Index([str(i) for i in range(100_000)], dtype="str")
    started = time.process_time()
    assert (positions_of(ids[::-1], ids) == np.arange(100_000)[::-1]).all()
    assert time.process_time() - started < 0.3, "Index.isin takes 0.6 s, and Series.loc as long again"


def test_a_table_that_needs_no_prices(tmp_path: Path) -> None:
    assert len(read(tmp_path, "sample_id\n2\n1\n", priced=False)) == 2


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither .*train\.csv nor train\.parquet exists"):
        read_table(str(tmp_path), "train", priced=True)


def test_positions_are_a_permutation(tmp_path: Path) -> None:
    text = "sample_id,price\n" + "".join(f"{i},1\n" for i in np.random.default_rng(0).permutation(200))
    assert sorted(read(tmp_path, text).file_order.tolist()) == list(range(200))


def spark_table(folder: Path, *parts: pd.DataFrame) -> None:
    (folder / "train.parquet").mkdir()
    for number, part in enumerate(parts):
        part.to_parquet(folder / "train.parquet" / f"part-{number:05d}.snappy.parquet", index=False)
    for name in ("_SUCCESS", "._part-00000.snappy.parquet", ".part-00000.snappy.parquet.crc"):
        (folder / "train.parquet" / name).write_bytes(b"no Parquet")


def test_a_folder_of_parts_is_a_table(tmp_path: Path) -> None:
    rows = pd.DataFrame({"sample_id": [10, 9, 7], "price": [1.0, 2.0, 3.0]})
    spark_table(tmp_path, rows[:2], rows[:0], rows[2:])
    table = read_table(str(tmp_path), "train", priced=True)
    assert table.ids.tolist() == ["10", "7", "9"]
    assert table.ids[table.file_order].tolist() == ["10", "9", "7"]


def test_parts_with_other_columns(tmp_path: Path) -> None:
    first = pd.DataFrame({"sample_id": [1], "price": [1.0]})
    spark_table(tmp_path, first, first.assign(sample_id=2, title="a"))
    with pytest.raises(DataError, match=r"part-00001.* has the columns .*title.*, .*part-00000.* has sample_id"):
        read_table(str(tmp_path), "train", priced=True)


def test_rejects_a_folder_without_parts(tmp_path: Path) -> None:
    spark_table(tmp_path)
    with pytest.raises(DataError, match=r"neither .*train\.csv nor train\.parquet exists"):
        read_table(str(tmp_path), "train", priced=True)


def test_a_file_as_data_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    with pytest.raises(DataError, match="is a file, expected the folder") as caught:
        read_table(str(tmp_path / "train.csv"), "train", priced=True)
    assert caught.value.remedy == f"give its folder: --data {tmp_path}"


def test_an_id_column_that_pandas_wrote_as_an_index(tmp_path: Path) -> None:
    pd.DataFrame({"price": [1.0]}, index=pd.Index(["a"], name="sample_id")).to_parquet(tmp_path / "train.parquet")
    assert read_table(str(tmp_path), "train", priced=True).ids.tolist() == ["a"]


def test_warns_of_few_rows_and_of_a_single_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_poor_prices(read(tmp_path, "sample_id,price\n" + "".join(f"{i},19.99\n" for i in range(499))))
    said = capsys.readouterr().err
    assert "warning" in said and "event=few_rows rows=499" in said and "event=one_price price=19.99" in said
    warn_of_poor_prices(read(tmp_path, "sample_id,price\n" + "".join(f"{i},{i + 1}\n" for i in range(500))))
    assert not capsys.readouterr().err
