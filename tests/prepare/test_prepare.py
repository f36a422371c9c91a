from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from fusion import storage
from fusion.convert import arrays
from fusion.data.embeddings import load
from fusion.data.inputs import find_sources
from fusion.data.row_store import RowStore
from fusion.data.tables import read_table
from fusion.distributed.world import join_world
from fusion.errors import DataError
from fusion.prepare import inputs
from fusion.prepare.__main__ import main

N, DIM = 100, 6
IDS = np.random.default_rng(1).permutation(N) + 95  # 99 comes before 100 as a number, and after it as text
VECTORS = np.random.default_rng(2).standard_normal((N, DIM)).astype(np.float32)
ORDER = np.argsort(IDS.astype(str))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "products.csv"
    pd.DataFrame({"sample_id": IDS, "price": 9.5}).to_csv(path, index=False)
    return path


def parquet(path: Path, ids: Any, vectors: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({"sample_id": ids, "embedding": column}), path)
    return path


def shuffled(path: Path, vectors: NDArray[Any] = VECTORS) -> Path:
    order = np.random.default_rng(3).permutation(N)
    return parquet(path, IDS[order], vectors[order])


def run(table: Path, *sources: object, more: tuple[str, ...] = ()) -> int:
    where = ["--table", str(table), "--to", str(table.parent / "data"), "--shard-rows", "40"]
    return main([*where, *more, *(word for source in sources for word in ("--source", str(source)))])


def folder(table: Path, source: str = "a") -> Path:
    return table.parent / "data/embeddings/train" / source


def written(table: Path, source: str = "a") -> tuple[list[str], NDArray[Any]]:
    found = pq.read_table(folder(table, source))
    return found["sample_id"].to_pylist(), np.stack(found["embedding"].to_numpy())


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def loaded(data: Path | str, source: str = "a") -> RowStore:
    with join_world("cpu") as world:
        return load(str(data), "train", {"role": source}, read_table(str(data), "train", priced=True).ids, world)


def test_rows_are_sorted_as_training_reads_them_and_divided_into_shards(table: Path) -> None:
    source = shuffled(table.parent / "raw/a.parquet")
    assert run(table, f"a={source}") == 0
    assert sorted(path.name for path in folder(table).iterdir()) == [
        "_MANIFEST.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"
    ]  # fmt: skip
    sizes = [pq.read_metadata(path).num_rows for path in sorted(folder(table).glob("*.parquet"))]
    assert sizes == [40, 40, 20]
    ids, vectors = written(table)
    assert ids == sorted(IDS.astype(str))
    assert np.array_equal(vectors, VECTORS[ORDER])
    assert (table.parent / "data/train.csv").read_bytes() == table.read_bytes()


def test_training_reads_the_same_vectors_as_from_the_source(table: Path) -> None:
    data = table.parent / "data"
    source = shuffled(data / "embeddings/train/raw.parquet")
    assert run(table, f"a={source}") == 0
    prepared, raw = loaded(data), loaded(data, "raw")
    assert prepared.values["role"].equal(raw.values["role"]) and prepared.present["role"].all()


def test_many_files_patterns_and_pairs_of_arrays_make_one_source(table: Path) -> None:
    raw = table.parent / "raw"
    for start in range(0, 60, 20):
        part = slice(start, start + 20)
        parquet(raw / f"part_{start:02d}/x.parquet", IDS[part].astype(str), VECTORS[part])
    for name, part in (("v1", slice(60, 90)), ("v2", slice(90, 100))):
        np.save(raw / f"{name}.npy", VECTORS[part])
        np.save(raw / f"i{name}.npy", IDS[part])
    assert run(table, f"a={raw}/part_*/*.parquet", f"a={raw}/v?.npy,{raw}/iv?.npy") == 0
    assert np.array_equal(written(table)[1], VECTORS[ORDER])
    manifest = json.loads((folder(table) / "_MANIFEST.json").read_text())
    assert len(manifest["inputs"]) == 7 and manifest["vectors"] == N


@pytest.mark.parametrize("kind", ["float16", "float64", "int32"])
def test_types_are_those_that_training_holds(table: Path, kind: str) -> None:
    np.save(table.parent / "v.npy", (VECTORS * 9 + 1).astype(kind))
    np.save(table.parent / "i.npy", IDS.astype(str).astype(object))
    assert run(table, f"a={table.parent}/v.npy,{table.parent}/i.npy") == 0
    _, vectors = written(table)
    assert vectors.dtype == (np.float16 if kind == "float16" else np.float32)
    assert np.array_equal(vectors, (VECTORS * 9 + 1).astype(kind)[ORDER].astype(vectors.dtype))


def test_each_fold_has_a_source_of_its_own(table: Path) -> None:
    for fold in range(2):
        shuffled(table.parent / f"fold{fold}.parquet", VECTORS + fold)
    assert run(table, f"a_{{fold}}={table.parent}/fold{{fold}}.parquet", more=("--folds", "2")) == 0
    assert np.array_equal(written(table, "a_1")[1] - 1, (VECTORS + 1)[ORDER] - 1)


def test_batches_need_not_hold_whole_files(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "BATCH_BYTES", 7 * DIM * 4)
    monkeypatch.setattr(arrays, "CHUNK_IDS", 9)
    np.save(table.parent / "v.npy", VECTORS)
    np.save(table.parent / "i.npy", IDS.astype(str))
    assert run(table, f"a={table.parent}/v.npy,{table.parent}/i.npy") == 0
    assert np.array_equal(written(table)[1], VECTORS[ORDER])


def test_nothing_is_done_again_unless_something_changed(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shuffled(table.parent / "raw/a.parquet")
    assert run(table, f"a={source}") == 0
    before = {path: path.stat().st_mtime_ns for path in (table.parent / "data").rglob("*")}
    capsys.readouterr()
    assert run(table, f"a={source}") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in said] == ["unchanged", "unchanged"]
    assert {path: path.stat().st_mtime_ns for path in (table.parent / "data").rglob("*")} == before
    shuffled(source, VECTORS + 1)
    assert run(table, f"a={source}") == 0
    assert np.array_equal(written(table)[1], (VECTORS + 1)[ORDER])
    (folder(table) / "part-00001.parquet").unlink()
    assert run(table, f"a={source}") == 0
    assert len(written(table)[0]) == N


def test_fewer_shards_replace_more(table: Path) -> None:
    source = shuffled(table.parent / "raw/a.parquet")
    assert run(table, f"a={source}") == 0
    assert run(table, f"a={source}", more=("--shard-rows", "60")) == 0
    assert sorted(path.name for path in folder(table).glob("*.parquet")) == [
        "part-00000.parquet", "part-00001.parquet"
    ]  # fmt: skip


def test_unusable_rows_are_counted_and_left_out(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = VECTORS.copy()
    vectors[7], vectors[8, 0] = 0, np.nan
    ids = np.concatenate([IDS[:98], [5, 6, 7], IDS[3:4]])
    vectors = np.concatenate([vectors[:98], VECTORS[:3], VECTORS[3:4]])
    source = parquet(table.parent / "raw.parquet", ids, vectors)
    assert run(table, f"a={source}", more=("--drop-bad-vectors",)) == 0
    out, err = capsys.readouterr()
    assert "96 vectors of 6 float32 in 3 files, 4 rows without one" in out
    assert "event=ids_not_in_table source=a rows=3 first=5, 6, 7" in err.replace('"', "")
    assert "event=not_finite source=a rows=1" in err and "event=vectors_of_zeros source=a rows=1" in err
    assert f"event=repeated_rows source=a rows=1 first={IDS[3]}" in err
    assert len(written(table)[0]) == 96 and str(IDS[7]) not in written(table)[0]


def with_nan(raw: Path) -> Path:
    vectors = VECTORS.copy()
    vectors[3, 2] = np.inf
    return parquet(raw, IDS, vectors)


WRONG: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "another vector": (
        lambda raw: parquet(raw, np.append(IDS, IDS[3]), np.vstack([VECTORS, VECTORS[4]])),
        f"1 ids of a occur with different vectors, the first: {IDS[3]}",
        "keep one vector for each id",
    ),
    "not finite": (
        with_nan,
        f"1 vectors of a have NaN or infinite values, the first: {IDS[3]}",
        "--drop-bad-vectors",
    ),
    "too few": (
        lambda raw: parquet(raw, IDS[:94], VECTORS[:94]),
        "source 'a' has embeddings for 94 of 100 rows, without: ",
        "--max-missing",
    ),
    "other spelling": (
        lambda raw: parquet(raw, [f"{one:06d}" for one in IDS], VECTORS),
        "100 of them differ only in their spelling",
        "write the ids in both files alike",
    ),
    "other ids": (lambda raw: parquet(raw, IDS + 1000, VECTORS), "no id is in both", "use the same ids"),
    "empty": (lambda raw: parquet(raw, pa.array([], pa.int64()), VECTORS[:0]), "has no vectors", "write"),
    "ids of floats": (lambda raw: parquet(raw, IDS.astype(float), VECTORS), "expected int64 or string", "write ids"),
    "no file": (lambda raw: raw, "is no file, and no folder with files *.parquet", "correct the path"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_source_is_refused_and_the_earlier_one_stays(
    table: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, message, hint = WRONG[name]
    assert run(table, f"a={shuffled(table.parent / 'good.parquet')}") == 0
    before = files(table.parent / "data")
    assert run(table, f"a={make(table.parent / 'raw.parquet')}") == 65
    error, remedy = capsys.readouterr().err.splitlines()[-2:]
    assert message in error and remedy.startswith("hint: ") and hint in remedy
    assert files(table.parent / "data") == before


@pytest.mark.parametrize("other", [VECTORS[:, :4], VECTORS.astype(np.float64)])
def test_files_of_several_kinds_are_refused(
    table: Path, capsys: pytest.CaptureFixture[str], other: NDArray[Any]
) -> None:
    first = parquet(table.parent / "x.parquet", IDS[:50], VECTORS[:50])
    second = parquet(table.parent / "y.parquet", IDS[50:], other[50:])
    assert run(table, f"a={first}", f"a={second}") == 65
    np.save(table.parent / "v.npy", other[50:])
    np.save(table.parent / "i.npy", IDS[50:])
    assert run(table, f"a={first}", f"a={table.parent}/v.npy,{table.parent}/i.npy") == 65
    assert capsys.readouterr().err.count("of 6 x float32") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--source", "a"],
        ["--source", "a=x.npy"],
        ["--source", "a=x.parquet,y.npy"],
        ["--source", "../a=x.parquet"],
        ["--source", "a=x.pkl"],
        ["--source", "a_{fold}=x_{fold}.parquet"],
        ["--source", "a=x_{fold}.parquet", "--folds", "2"],
        ["--source", "a=x.parquet", "--shard-rows", "0"],
        ["--source", "a=x.parquet", "--max-missing", "2"],
        ["--source", "a=x.parquet", "--split", "a/b"],
        ["--source", "a=x.parquet", "--ray-address", "10.0.0.1:6379"],
        [],
    ],
)
def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["--to", str(tmp_path), *arguments]) == 64
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "\nhint: " in said


def test_files_of_others_are_not_replaced(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = shuffled(folder(table) / "mine.parquet")
    assert run(table, f"a={inside}") == 64
    assert run(table, f"a={shuffled(table.parent / 'raw.parquet')}") == 65
    shuffled(folder(table, "b.parquet"))
    assert run(table, f"b={table.parent / 'raw.parquet'}") == 65
    assert capsys.readouterr().err.count("this command has not written it") == 2
    assert list(folder(table).iterdir()) == [inside]


def test_a_second_table_beside_the_first_is_refused(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shuffled(table.parent / "raw.parquet")
    (table.parent / "data").mkdir()
    pd.read_csv(table).to_parquet(table.parent / "data/train.parquet")
    assert run(table, f"a={source}") == 65
    assert "train.parquet exists beside" in capsys.readouterr().err
    assert main(["--to", str(table.parent / "data"), "--source", f"a={source}"]) == 0, "the table that is there"


def test_training_refuses_a_folder_that_is_being_written(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = shuffled(table.parent / "raw.parquet"), str(table.parent / "data")
    seen = []

    def look_and_copy(source: str, target: str) -> None:
        seen.append(target)
        with pytest.raises(DataError, match="is not complete"):
            find_sources(data, "train", {"role": "a"})
        storage.write(target, storage.read(source))

    monkeypatch.setattr(storage, "copy", look_and_copy)
    assert run(table, f"a={source}") == 0
    assert len(seen) == 3 and len(find_sources(data, "train", {"role": "a"})["role"]) == 3


def test_a_source_that_changes_while_it_is_read_is_refused(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shuffled(table.parent / "raw.parquet")
    from fusion.prepare import work

    original = work.divided

    def change(*arguments: Any) -> Any:
        shuffled(source, VECTORS + 1)
        return original(*arguments)

    monkeypatch.setattr(work, "divided", change)
    assert run(table, f"a={source}") == 69
    assert not folder(table).exists()


def test_a_stop_request_leaves_the_earlier_source(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(table, f"a={shuffled(table.parent / 'x.parquet')}") == 0
    before = files(table.parent / "data")
    monkeypatch.setattr("fusion.signals.requested", lambda: True)
    assert run(table, f"a={shuffled(table.parent / 'y.parquet')}") == 75
    assert files(table.parent / "data") == before


def test_a_full_disk_is_an_error_with_a_hint(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fusion.prepare.work.finish_shard", full)
    assert run(table, f"a={shuffled(table.parent / 'x.parquet')}") == 78
    assert "hint: set TMPDIR to a folder with room" in capsys.readouterr().err


def test_objects_of_a_bucket(bucket: str, table: Path) -> None:
    np.save(table.parent / "v.npy", VECTORS)
    np.save(table.parent / "i.npy", IDS)
    shuffled(table.parent / "x.parquet")
    for name in ("products.csv", "v.npy", "i.npy", "x.parquet"):
        storage.write(f"{bucket}/raw/{name}", (table.parent / name).read_bytes())
    sources = ["--source", f"a={bucket}/raw/v.npy,{bucket}/raw/i.npy", "--source", f"b={bucket}/raw/*.parquet"]
    assert main(["--table", f"{bucket}/raw/products.csv", "--to", f"{bucket}/data", *sources]) == 0
    one, other = loaded(f"{bucket}/data"), loaded(f"{bucket}/data", "b")
    assert one.values["role"].equal(other.values["role"]) and one.present["role"].all()


@pytest.mark.parametrize(("package", "hint"), [("polars", "pip install polars"), ("ray", "pip install 'ray[data]'")])
def test_without_a_package_a_hint_says_how_to_install_it(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, hint: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    assert run(table, "a=x.parquet", more=("--engine", "ray")) == 64
    assert capsys.readouterr().err == f"error: {package} is not installed\nhint: {hint}\n"
