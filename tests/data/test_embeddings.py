from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fusion.data.embeddings import load
from fusion.data.row_store import RowStore
from fusion.distributed.world import World, join_world
from fusion.errors import DataError
from tests.conftest import upload
from tests.forked import run_ranks

DIM = 5


@pytest.fixture
def alone() -> Iterator[World]:
    with join_world("cpu") as world:
        yield world


def vectors(n: int, dtype: str = "float32", dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, dim)).astype(dtype)


def write(path: Path, ids: Sequence[object], values: np.ndarray, *, fixed: bool = True, rows: int = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = pa.array(values.reshape(-1))
    if fixed:
        column = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    else:
        column = pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32()), flat)
    pq.write_table(pa.table({"sample_id": pa.array(ids), "embedding": column}), path, row_group_size=rows)


def source(folder: Path, name: str = "s") -> Path:
    return folder / "embeddings" / "train" / f"{name}.parquet"


def read(folder: Path | str, n: int, world: World, max_missing: float = 1.0) -> RowStore:
    ids = pd.Index([str(i) for i in range(n)])
    return load(str(folder), "train", {"a": "s"}, ids, world, max_missing=max_missing)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("fixed", [True, False])
def test_every_type_and_row_order(tmp_path: Path, alone: World, dtype: str, fixed: bool) -> None:
    values, order = vectors(50, dtype), np.random.default_rng(1).permutation(50)
    write(source(tmp_path), order.tolist(), values[order], fixed=fixed, rows=7)
    store = read(tmp_path, 50, alone)
    assert store.values["a"].dtype == (torch.float16 if dtype == "float16" else torch.float32)
    assert store.dims == {"a": DIM}
    np.testing.assert_array_equal(store.values["a"].numpy(), values.astype(store.values["a"].numpy().dtype))
    assert store.present["a"].all()


def test_text_ids_and_several_files(tmp_path: Path, alone: World) -> None:
    values = vectors(30)
    for part in range(3):
        rows = slice(part * 10, part * 10 + 10)
        path = tmp_path / "embeddings" / "train" / "s" / f"part-{part}.parquet"
        write(path, [str(i) for i in range(30)][rows], values[rows], rows=4)
    np.testing.assert_array_equal(read(tmp_path, 30, alone).values["a"].numpy(), values)


def test_missing_null_and_broken_rows(tmp_path: Path, alone: World, capsys: pytest.CaptureFixture[str]) -> None:
    values = vectors(20)
    values[3, 1], values[4, 0] = np.nan, np.inf
    listed: list[list[float] | None] = [row.tolist() for row in values]
    listed[5] = None
    path = source(tmp_path)
    path.parent.mkdir(parents=True)
    column = pa.array(listed[:18], pa.list_(pa.float32(), DIM))
    pq.write_table(pa.table({"sample_id": [*range(15), 100, 101, 102], "embedding": column}), path)
    store = read(tmp_path, 20, alone)
    assert np.flatnonzero(~store.present["a"].numpy()).tolist() == [3, 4, 5, *range(15, 20)]
    assert not store.values["a"][~store.present["a"]].any()
    np.testing.assert_array_equal(store.values["a"][6:15].numpy(), values[6:15])
    said = capsys.readouterr().err
    assert "event=not_finite role=a rows=3 first=3,4,5" in said
    assert "event=ids_not_in_table role=a rows=3" in said
    assert "missing=5" in said
    assert "event=rows_without_any_embedding rows=8" in said


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_vector_of_zeros_counts_as_missing(
    tmp_path: Path, alone: World, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    values = vectors(10, dtype)
    values[[2, 7]] = 0
    values[7, 1] = -0.0
    write(source(tmp_path), list(range(10)), values)
    store = read(tmp_path, 10, alone, max_missing=0.2)
    assert np.flatnonzero(~store.present["a"].numpy()).tolist() == [2, 7]
    said = capsys.readouterr().err
    assert "event=vectors_of_zeros role=a rows=2 first=2,7" in said
    assert "not_finite" not in said
    with pytest.raises(DataError, match="8 of 10 rows, without: 2, 7"):
        read(tmp_path, 10, alone, max_missing=0.1)


def test_a_source_of_zeros_is_missing_altogether(tmp_path: Path, alone: World) -> None:
    write(source(tmp_path), list(range(10)), vectors(10) * 0)
    with pytest.raises(DataError, match="0 of 10 rows"):
        read(tmp_path, 10, alone, max_missing=0.05)


def test_a_float64_too_large_for_float32_counts_as_not_finite(tmp_path: Path, alone: World) -> None:
    values = vectors(4, "float64")
    values[2, 0] = 1e300
    write(source(tmp_path), list(range(4)), values)
    assert read(tmp_path, 4, alone).present["a"].tolist() == [True, True, False, True]


def test_too_many_missing(tmp_path: Path, alone: World) -> None:
    write(source(tmp_path), list(range(18)), vectors(18))
    read(tmp_path, 20, alone, max_missing=0.1)
    with pytest.raises(DataError, match=r"18 of 20 rows, without: 18, 19") as caught:
        read(tmp_path, 20, alone, max_missing=0.05)
    assert "--max-missing" in caught.value.remedy


def test_an_id_twice(tmp_path: Path, alone: World) -> None:
    write(source(tmp_path), [0, 1, 2, 2, 0, 99], vectors(6))
    with pytest.raises(DataError, match=r"2 ids occur more than once in source 's'.*: 0, 2"):
        read(tmp_path, 5, alone)


def test_files_of_a_source_that_differ(tmp_path: Path, alone: World) -> None:
    folder = tmp_path / "embeddings" / "train" / "s"
    write(folder / "0.parquet", [0], vectors(1))
    write(folder / "1.parquet", [1], vectors(1, dim=7))
    with pytest.raises(DataError, match=r"1\.parquet has vectors of 7 x float32, .*0\.parquet of 5 x float32"):
        read(tmp_path, 2, alone)
    write(folder / "1.parquet", [1], vectors(1, "float16"))
    with pytest.raises(DataError, match=r"5 x float16, .* 5 x float32"):
        read(tmp_path, 2, alone)


def test_ragged_vectors(tmp_path: Path, alone: World) -> None:
    path = source(tmp_path)
    path.parent.mkdir(parents=True)
    column = pa.array([[1.0, 2.0], [1.0, 2.0, 3.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"sample_id": [0, 1], "embedding": column}), path)
    with pytest.raises(DataError, match="vectors of 2 and of 3 numbers"):
        read(tmp_path, 2, alone)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: b"", "not a complete Parquet file"),
        (lambda data: data[: len(data) // 2], "not a complete Parquet file"),
        (lambda data: b"sample_id,embedding\n1,2\n", "not a complete Parquet file"),
        (lambda data: data[:40] + bytes(200) + data[240:], "not a complete Parquet file"),
    ],
    ids=["empty", "truncated", "text", "overwritten"],
)
def test_a_damaged_file(tmp_path: Path, alone: World, damage: object, expected: str) -> None:
    write(source(tmp_path), list(range(50)), vectors(50))
    source(tmp_path).write_bytes(damage(source(tmp_path).read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=expected):
        read(tmp_path, 50, alone)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"id": [1], "embedding": [[1.0]]}, r"no column 'sample_id'; it has \['id', 'embedding'\]"),
        ({"sample_id": [1], "vector": [[1.0]]}, "no column 'embedding'"),
        ({"sample_id": [1.5], "embedding": [[1.0]]}, "'sample_id' .* is double, expected int64 or string"),
        ({"sample_id": [1], "embedding": [1.0]}, "'embedding' .* is double, expected a list"),
        ({"sample_id": [1], "embedding": [["x"]]}, "'embedding' .* is list<.*string>, expected a list"),
        ({"sample_id": [None, 1], "embedding": [[1.0], [1.0]]}, "1 rows without a sample_id"),
    ],
)
def test_wrong_columns(tmp_path: Path, alone: World, table: dict[str, list[object]], expected: str) -> None:
    path = source(tmp_path)
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(table), path)
    with pytest.raises(DataError, match=expected):
        read(tmp_path, 2, alone)


def test_parts_without_rows_and_hidden_files_are_ignored(tmp_path: Path, alone: World) -> None:
    folder = tmp_path / "embeddings" / "train" / "s.parquet"
    write(folder / "part-0.parquet", pa.array([], pa.int64()), vectors(0), fixed=False)
    write(folder / "part-1.parquet", [0, 1, 2], vectors(3))
    for name in ("._part-1.parquet", ".part-1.parquet.crc", "_SUCCESS", "_metadata"):
        (folder / name).write_bytes(b"no Parquet")
    np.testing.assert_array_equal(read(tmp_path, 3, alone).values["a"].numpy(), vectors(3))


def test_a_source_without_any_row(tmp_path: Path, alone: World) -> None:
    write(source(tmp_path), pa.array([], pa.int64()), vectors(0))
    with pytest.raises(DataError, match=r"source 's' in .* has no vectors"):
        read(tmp_path, 2, alone)


def test_vectors_without_numbers(tmp_path: Path, alone: World) -> None:
    path = source(tmp_path)
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"sample_id": [0], "embedding": pa.array([[]], pa.list_(pa.float32()))}), path)
    with pytest.raises(DataError, match="vectors of 0 numbers"):
        read(tmp_path, 1, alone)


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.int32(), pa.uint64()],
    ids=str,
)
def test_every_kind_of_id(tmp_path: Path, alone: World, kind: pa.DataType) -> None:
    ids = pa.array(range(3)) if pa.types.is_integer(kind) else pa.array(["0", "1", "2"])
    ids = ids.dictionary_encode() if pa.types.is_dictionary(kind) else ids.cast(kind)
    path = source(tmp_path)
    path.parent.mkdir(parents=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors(3).reshape(-1)), DIM)
    pq.write_table(pa.table({"sample_id": ids, "embedding": column}), path)
    np.testing.assert_array_equal(read(tmp_path, 3, alone).values["a"].numpy(), vectors(3))


@pytest.mark.parametrize("save", [np.save, np.savez], ids=["npy", "npz"])
def test_a_numpy_file_that_is_called_parquet(tmp_path: Path, alone: World, save: Callable[..., None]) -> None:
    source(tmp_path).parent.mkdir(parents=True)
    with source(tmp_path).open("wb") as file:
        save(file, vectors(3))
    with pytest.raises(DataError, match="is a NumPy file") as caught:
        read(tmp_path, 3, alone)
    assert "python -m fusion.convert" in caught.value.remedy


def test_if_no_ids_match_the_error_shows_ids_of_both_sides(tmp_path: Path, alone: World) -> None:
    write(source(tmp_path), ["X0", "X1"], vectors(2))
    with pytest.raises(
        DataError, match="0 of 2 rows, without: 0, 1; it has other ids instead: X0, X1; no id"
    ) as caught:
        read(tmp_path, 2, alone, max_missing=0.05)
    assert "--max-missing" not in caught.value.remedy  # nothing would be left


@pytest.mark.parametrize("spelling", ["{}.0", "00{}", " {} "])
def test_ids_that_differ_only_in_spelling(tmp_path: Path, alone: World, spelling: str) -> None:
    write(source(tmp_path), [spelling.format(i) for i in range(4)], vectors(4))
    with pytest.raises(DataError, match="4 of them differ only in their spelling"):
        read(tmp_path, 4, alone, max_missing=0.05)


def test_one_source_for_two_roles(tmp_path: Path, alone: World, capsys: pytest.CaptureFixture[str]) -> None:
    for name, values in {"s": vectors(4), "copy": vectors(4), "t": vectors(4) + 1}.items():
        write(source(tmp_path, name), list(range(4)), values)
    ids = pd.Index([str(i) for i in range(4)])
    load(str(tmp_path), "train", {"a": "s", "b": "t", "c": "s", "d": "copy"}, ids, alone)
    said = capsys.readouterr().err
    assert "event=same_vectors roles=a,c sources=s,s" in said
    assert "event=same_vectors roles=a,d sources=s,copy" in said
    assert "roles=a,b" not in said


def test_a_source_that_does_not_exist_lists_those_that_do(tmp_path: Path, alone: World) -> None:
    write(source(tmp_path, "other"), [0], vectors(1))
    with pytest.raises(DataError, match=r"for the role a; .* holds other") as caught:
        read(tmp_path, 1, alone)
    assert "--sources.a NAME" in caught.value.remedy


def test_the_digest_depends_on_values_but_not_on_the_order_of_rows(tmp_path: Path, alone: World) -> None:
    values = vectors(20)
    write(source(tmp_path), list(range(20)), values)
    before = read(tmp_path, 20, alone).digest
    write(source(tmp_path), list(range(20))[::-1], values[::-1], rows=3)
    assert read(tmp_path, 20, alone).digest == before
    values[7, 2] += 1
    write(source(tmp_path), list(range(20)), values)
    assert read(tmp_path, 20, alone).digest != before


def test_the_same_rows_from_s3(tmp_path: Path, alone: World, bucket: str) -> None:
    values = vectors(500)
    write(source(tmp_path), list(range(500)), values, rows=64)
    upload(tmp_path, bucket)
    np.testing.assert_array_equal(read(bucket, 500, alone).values["a"].numpy(), values)


def ids_that_two_ranks_see(world: World) -> None:
    """Each rank reads one file of the source; what they found is judged together."""
    folder = Path(os.environ["FUSION_TEST_FOLDER"])
    np.testing.assert_array_equal(read(folder / "good", 20, world).values["a"].numpy(), vectors(20))
    for name, expected in {
        "twice": "1 ids occur more than once in source 's'.*: 3",
        "other": "other ids instead: X",
    }.items():
        with pytest.raises(DataError, match=expected):
            read(folder / name, 20, world, max_missing=0.05)


def test_ids_are_checked_over_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_TEST_FOLDER", str(tmp_path))
    second = {"good": range(10, 20), "twice": [3, *range(11, 20)], "other": ["X", "Y", *map(str, range(12, 20))]}
    for name, ids in second.items():
        folder = tmp_path / name / "embeddings" / "train" / "s"
        write(folder / "0.parquet", list(range(10)), vectors(20)[:10])
        write(folder / "1.parquet", list(ids), vectors(20)[10:])
    done = run_ranks(2, ids_that_two_ranks_see)
    assert done.returncode == 0, done.stderr


PEAK = """
import sys
import pandas as pd
from fusion.distributed.world import join_world
from fusion.data.embeddings import load
def peak():
    status = open("/proc/self/status").read()  # ru_maxrss would include the peak of the parent process
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
with join_world("cpu") as world:
    load(sys.argv[1], "train", {"a": "small"}, pd.Index(["0"]), world)
    before = peak()
    store = load(sys.argv[1], "train", {"a": "s"}, pd.Index([str(i) for i in range(120000)]), world)
    print((peak() - before) / store.values["a"].nbytes)
"""


@pytest.mark.parametrize("rows", [2048, 120000], ids=["row groups", "one huge row group"])
def test_peak_memory_is_bounded(tmp_path: Path, rows: int) -> None:
    write(source(tmp_path, "small"), [0], vectors(1))
    write(source(tmp_path), list(range(120000)), vectors(120000, dim=1024), rows=rows)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 1 <= float(done.stdout) < 1.6
