"""The number of requests for a larger file of a source, counted by a store inside this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from fusion.data.source_file import STREAM_BYTES, Kind, kind_of, open_part, parts_of
from fusion.storage import Entry

DIM, ROWS = 256, 2048  # of a row group, which has 2 MiB of vectors


class CountedFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.fetched.append((start, end))
        return Path(self.path).read_bytes()[start:end]


class CountedStore(AbstractFileSystem):
    """Files of this machine, whose ranges are fetched one by one as from an object store."""

    protocol, cachable = "counted", False
    fetched: list[tuple[int, int]] = []  # noqa: RUF012 (each use makes another store)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": Path(path).stat().st_size, "type": "file"}

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> CountedFile:
        settings.pop("autocommit", None)
        return CountedFile(self, path, mode, **settings)


@pytest.fixture
def fetched() -> list[tuple[int, int]]:
    """The ranges that were fetched, first byte and the one after the last."""
    fsspec.register_implementation("counted", CountedStore, clobber=True)
    CountedStore.fetched.clear()
    return CountedStore.fetched


def write(path: Path, n_groups: int, rows: int, **others: pa.Array) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((n_groups * rows, DIM), dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), DIM)
    columns = {"sample_id": pa.array(range(len(values))), **others, "embedding": column}
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return values


def read(path: Path) -> tuple[int, list[str], np.ndarray]:
    """The number of parts of the file, and all its ids and vectors."""
    ids, vectors = list[str](), list[np.ndarray]()
    parts = parts_of(Entry(f"counted://{path}", path.stat().st_size))
    kind = kind_of(parts[0], None)
    assert kind == Kind(f"counted://{path}", DIM, "float32")
    for part in parts:
        with open_part(part, kind, None) as (found, batches):
            ids += found.to_pylist()
            vectors += [np.array(batch) for batch, _ in batches]
    return len(parts), ids, np.concatenate(vectors)


def test_a_larger_file_costs_its_footer_and_its_row_groups(tmp_path: Path, fetched: list[tuple[int, int]]) -> None:
    values = write(tmp_path / "s.parquet", 3, ROWS)
    n_parts, ids, found = read(tmp_path / "s.parquet")
    assert n_parts == 3
    assert len(fetched) == 1 + 3, fetched
    assert ids == [str(i) for i in range(3 * ROWS)]
    np.testing.assert_array_equal(found, values)


def test_a_large_row_group_is_fetched_in_parts(tmp_path: Path, fetched: list[tuple[int, int]]) -> None:
    values = write(tmp_path / "s.parquet", 1, 3 * ROWS)
    _, ids, found = read(tmp_path / "s.parquet")
    assert len(ids) == len(found) == len(values)
    np.testing.assert_array_equal(found, values)
    assert max(end - start for start, end in fetched) <= STREAM_BYTES
    assert len(fetched) == 1 + 1 + 2, "the footer, the ids, and 6 MiB of vectors in two"


def test_bytes_between_distant_columns_are_not_fetched(tmp_path: Path, fetched: list[tuple[int, int]]) -> None:
    between = pa.array([bytes(np.random.default_rng(row).bytes(2048)) for row in range(2 * ROWS)])
    values = write(tmp_path / "s.parquet", 2, ROWS, notes=between)
    _, _, found = read(tmp_path / "s.parquet")
    np.testing.assert_array_equal(found, values)
    assert len(fetched) == 1 + 2 * 2, "of each row group its ids and its vectors"
