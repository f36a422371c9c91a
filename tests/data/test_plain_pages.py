"""Plain pages are read without pyarrow, and everything else is left to it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion.data import plain_pages, source_file
from fusion.data.plain_pages import NotPlain, plain_chunk, plain_vectors
from fusion.data.source_file import Kind, open_part, parts_of
from fusion.errors import DataError
from fusion.storage import Entry

PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False}
N = 3000


def vectors_of(dim: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(dim).standard_normal((N, dim)).astype(dtype)


def column_of(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def write(path: Path, column: pa.Array, **settings: Any) -> Path:
    table = pa.table({"sample_id": np.arange(len(column)), "embedding": column})
    pq.write_table(table, path, **({"row_group_size": 1000} | PLAIN | settings))
    return path


def plainly(path: Path, dim: int, dtype: str = "float32") -> np.ndarray:
    """The vectors of all row groups; raises NotPlain if one is not plain."""
    footer, found = pq.read_metadata(path), list[np.ndarray]()
    for group in range(footer.num_row_groups):
        chunk = plain_chunk(footer, group, dim, dtype)
        if chunk is None:
            raise NotPlain
        found += [batch.copy() for batch in plain_vectors(io.BytesIO(path.read_bytes()), chunk, dim, 1 << 12)]
    return np.concatenate(found)


def read(path: Path, dim: int) -> tuple[np.ndarray, list[int]]:
    """The vectors and their rows, as training reads them."""
    url, vectors, rows = str(path), list[np.ndarray](), list[int]()
    start = 0
    for part in parts_of(Entry(url, path.stat().st_size)):
        with open_part(part, Kind(url, dim, "float32"), None) as (ids, batches):
            for batch, positions in batches:
                vectors.append(np.array(batch))
                rows += (start + positions).tolist()
            start += len(ids)
    return np.concatenate(vectors), rows


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_file, "STREAM_BYTES", 1 << 14)  # so that the files here count as large


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 64, 129])
def test_plain_vectors_are_those_that_were_written(tmp_path: Path, dim: int, dtype: str) -> None:
    values = vectors_of(dim, dtype)
    path = write(tmp_path / "s.parquet", column_of(values), data_page_size=1 << 13)
    found = plainly(path, dim, dtype)
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()


@pytest.mark.parametrize("kind", ["list", "large_list", "required"])
def test_lists_of_every_kind_are_plain_if_their_lengths_are_the_same(tmp_path: Path, kind: str) -> None:
    values = vectors_of(33)
    offsets, flat = np.arange(N + 1) * 33, pa.array(values.reshape(-1))
    column = column_of(values)
    if kind == "list":
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
    if kind == "large_list":
        column = pa.LargeListArray.from_arrays(pa.array(offsets), flat)
    if kind == "required":
        column = column.cast(pa.list_(pa.field("element", pa.float32(), nullable=False), 33))
    np.testing.assert_array_equal(plainly(write(tmp_path / "s.parquet", column), 33), values)


def unusual(name: str) -> tuple[pa.Array, dict[str, Any]]:
    """Vectors of 64 numbers, and how to write them so that their pages are not plain."""
    values = vectors_of(64)
    column = column_of(values)
    if name == "null vectors":
        column = pa.array([None if row % 7 == 3 else one for row, one in enumerate(values.tolist())], column.type)
    settings: dict[str, dict[str, Any]] = {
        "compressed": {"compression": "zstd"},
        "dictionary": {"use_dictionary": True},
        "version 2": {"data_page_version": "2.0"},
        "split bytes": {"column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"}},
    }
    return column, settings.get(name, {})


@pytest.mark.parametrize("name", ["null vectors", "compressed", "dictionary", "version 2", "split bytes"])
def test_other_pages_are_left_to_pyarrow(tmp_path: Path, name: str) -> None:
    column, settings = unusual(name)
    path = write(tmp_path / "s.parquet", column, **settings)
    with pytest.raises(NotPlain):
        plainly(path, 64)
    vectors, rows = read(path, 64)
    assert rows == np.flatnonzero(column.is_valid()).tolist()
    np.testing.assert_array_equal(vectors, vectors_of(64)[rows])


def test_null_numbers_and_other_lengths_are_not_plain(tmp_path: Path) -> None:
    rows = vectors_of(64)[:1000].tolist()
    rows[10][5] = None
    with pytest.raises(NotPlain):
        plainly(write(tmp_path / "null.parquet", pa.array(rows, pa.list_(pa.float32()))), 64)
    rows = vectors_of(64)[:1000].tolist()
    rows[20].append(rows[21].pop())  # as many numbers in all
    path = write(tmp_path / "lengths.parquet", pa.array(rows, pa.list_(pa.float32())))
    with pytest.raises(NotPlain):
        plainly(path, 64)
    with pytest.raises(DataError, match="vectors of 64 and of 65 numbers"):
        read(path, 64)


def test_pyarrow_is_not_asked_for_plain_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = vectors_of(64)
    path = write(tmp_path / "s.parquet", column_of(values))
    monkeypatch.setattr(source_file, "_decoded", lambda *_: pytest.fail("pyarrow decodes them"))
    vectors, rows = read(path, 64)
    assert rows == list(range(N))
    np.testing.assert_array_equal(vectors, values)


def test_a_page_that_is_too_large_is_left_to_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pages, "LARGEST_PAGE", 1 << 15)
    values = vectors_of(64)
    path = write(tmp_path / "s.parquet", column_of(values))
    with pytest.raises(NotPlain):
        plainly(path, 64)
    np.testing.assert_array_equal(read(path, 64)[0], values)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_levels_and_headers_never_yield_other_rows(tmp_path: Path, seed: int) -> None:
    """Any byte outside the numbers may change: the same vectors are found, or the damage is."""
    path = write(tmp_path / "s.parquet", column_of(vectors_of(64)[:500]))
    content, footer = bytearray(path.read_bytes()), pq.read_metadata(path)
    chunk = plain_chunk(footer, 0, 64, "float32")
    assert chunk
    head = chunk.end - chunk.start - 500 * 64 * 4  # one page: its header and levels
    for _ in range(200):
        place = chunk.start + int(np.random.default_rng([seed, _]).integers(head))
        kept, content[place] = content[place], content[place] ^ (1 << _ % 8)
        try:
            found = np.concatenate(list(plain_vectors(io.BytesIO(content), chunk, 64, 1 << 12)))
            np.testing.assert_array_equal(found, vectors_of(64)[:500])
        except NotPlain:
            pass
        content[place] = kept


def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "s.parquet", column_of(vectors_of(64)))
    part = parts_of(Entry(str(path), path.stat().st_size))[2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3 + 20000])
    with (
        pytest.raises(DataError, match=r"s\.parquet is not a complete Parquet file"),
        open_part(part, Kind(str(path), 64, "float32"), None) as (_, batches),
    ):
        list(batches)
