"""The cache of rows: what is kept in it, when it is used, and what happens if it is damaged, full or outdated."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fusion.data import embeddings, row_cache, row_store
from fusion.data.embeddings import load
from fusion.data.row_store import RowStore
from fusion.distributed.world import World, join_world
from fusion.errors import ConfigError, DataError
from tests.data.test_embeddings import source, vectors, write
from tests.forked import run_ranks

N = 50


@pytest.fixture
def alone() -> Iterator[World]:
    with join_world("cpu") as world:
        yield world


@pytest.fixture
def data(tmp_path: Path) -> Path:
    values = vectors(N)
    values[3], values[4, 0] = 0, np.nan
    write(source(tmp_path), list(range(1, N + 1)), values, rows=7)
    return tmp_path


def read(data: Path, world: World, cache: str | None = "cache", max_missing: float = 1.0) -> RowStore:
    ids = pd.Index([str(i) for i in range(N)])
    folder = None if cache is None else str(data / cache)
    return load(str(data), "train", {"a": "s"}, ids, world, max_missing=max_missing, cache=folder)


def folders(data: Path) -> list[str]:
    return sorted(os.listdir(data / "cache"))


def same(first: RowStore, second: RowStore) -> bool:
    return torch.equal(first.values["a"], second.values["a"]) and torch.equal(first.present["a"], second.present["a"])


def test_the_second_job_reads_no_source_and_reports_the_same(
    data: Path, alone: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read(data, alone, cache=None)
    said = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert same(plain, read(data, alone))
    capsys.readouterr()
    monkeypatch.setattr(embeddings, "_read", None)
    again = read(data, alone)
    lines = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert same(plain, again) and again.digest == plain.digest
    assert "event=cached_rows" in lines[0] and lines[1:] == said
    assert "vectors_of_zeros" in str(said) and "not_finite" in str(said) and "ids_not_in_table" in str(said)
    with pytest.raises(DataError, match="usable embeddings for 47 of 50"):
        read(data, alone, max_missing=0.05)


def test_a_changed_source_is_read_again_and_replaces_the_rows_of_before(data: Path, alone: World) -> None:
    read(data, alone)
    before = folders(data)
    write(source(data), list(range(N)), vectors(N) + 1)
    assert same(read(data, alone), read(data, alone, cache=None))
    assert len(folders(data)) == 1 and folders(data) != before


@pytest.mark.parametrize("damage", ["values", "manifest", "short", "kind"])
def test_damaged_rows_are_read_again(data: Path, alone: World, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = read(data, alone, cache=None)
    read(data, alone)
    (folder,) = (data / "cache").iterdir()
    values, manifest = folder / "a.values", folder / "MANIFEST.json"
    if damage == "values":
        values.write_bytes(b"x" + values.read_bytes()[1:])
    elif damage == "short":
        values.write_bytes(values.read_bytes()[:-4])
    else:
        made = json.loads(manifest.read_text())
        made["sources"]["a"]["dtype"] = "int8"
        manifest.write_text(json.dumps(made) if damage == "kind" else "{")
    capsys.readouterr()
    assert same(read(data, alone), plain)
    assert "cache_damaged" in capsys.readouterr().err
    assert same(read(data, alone), plain)
    assert "cache_damaged" not in capsys.readouterr().err


def test_every_file_is_compared_with_its_blocks(
    data: Path, alone: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(row_cache, "BLOCK_BYTES", 16)
    plain = read(data, alone, cache=None)
    read(data, alone)
    (folder,) = (data / "cache").iterdir()
    for name in ("present", "zeros", "known", "values"):
        file = folder / f"a.{name}"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        capsys.readouterr()
        assert same(read(data, alone), plain)
        assert "cache_damaged" in capsys.readouterr().err, name


@pytest.mark.parametrize("damaged", [False, True])
def test_a_manifest_of_an_earlier_version_has_no_blocks(
    data: Path, alone: World, damaged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = read(data, alone)
    (folder,) = (data / "cache").iterdir()
    made = json.loads((folder / "MANIFEST.json").read_text())
    del made["blocks"]
    (folder / "MANIFEST.json").write_text(json.dumps(made | ({"sha256": "0" * 64} if damaged else {})))
    capsys.readouterr()
    again = read(data, alone)
    assert same(again, plain) and again.digest == plain.digest
    assert ("cache_damaged" in capsys.readouterr().err) == damaged


def test_the_digest_of_cached_rows_is_that_of_their_content(data: Path, alone: World) -> None:
    read(data, alone)
    cached = read(data, alone)
    assert cached.digest == RowStore(cached.values, cached.present).digest


def test_what_killed_jobs_left_is_removed_but_not_what_others_write(data: Path, alone: World) -> None:
    cache = data / "cache"
    writing = row_cache._PartialFolder(row_cache.CacheFolder(cache / "other", "other"))
    for name in ("partial-dead", writing.path.name):
        (cache / name).mkdir(exist_ok=True)
        os.utime(cache / name, (0, 0))
    (cache / "partial-new").mkdir()
    read(data, alone)
    assert len(folders(data)) == 3 and {writing.path.name, "partial-new"} < set(folders(data))
    writing.remove()


def test_a_job_that_fails_leaves_nothing(data: Path, alone: World) -> None:
    write(source(data), [1, 1], vectors(2))
    with pytest.raises(DataError, match="more than once"):
        read(data, alone)
    assert folders(data) == []


def test_a_cache_that_cannot_be_written(data: Path, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be written: (File exists|Not a directory)"):
        read(data, alone, cache="file")

    def fallocate(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(ConfigError, match=r"has no room for 0\.0 GiB: No space left on device"):
        read(data, alone)
    assert folders(data) == []


def test_rows_larger_than_the_memory_need_the_cache(data: Path, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "usable_memory", lambda: N * 5 * 4 - 1)
    with pytest.raises(ConfigError, match=r"take 0\.0 GiB of memory") as raised:
        read(data, alone, cache=None)
    assert "--cache FOLDER" in raised.value.remedy
    read(data, alone)


@pytest.mark.parametrize(("together", "ahead"), [(1, 1 << 26), (1, 0), (4, 0), (1000, 0)])
def test_mapped_rows_give_the_same_batches(
    data: Path, alone: World, together: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_store, "AHEAD_BYTES", ahead)
    store, cpu = read(data, alone), torch.device("cpu")
    mapped = store.resident_on(cpu, "mapped")
    assert mapped.is_mapped and not store.resident_on(cpu).is_mapped
    parts = torch.split(torch.randperm(N).repeat(20), 7)
    for rows, batch in zip(parts, mapped.batches(parts, cpu, together), strict=True):
        assert torch.equal(batch.inputs["a"], store.batch(rows, cpu).inputs["a"])


def test_rows_of_more_than_half_of_the_memory_are_mapped(
    data: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = read(data, alone)
    monkeypatch.setattr("fusion.data.row_store.usable_memory", lambda: 2 * store.n_bytes - 1)
    assert store.resident_on(torch.device("cpu")).is_mapped
    assert not store.resident_on(torch.device("cpu"), "host").is_mapped


def cached_by_two_ranks(world: World) -> None:
    data = Path(os.environ["DATA"])
    first, second = read(data, world), read(data, world)
    assert same(first, second) and same(first, read(data, world, cache=None))


def test_two_ranks_share_the_files(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(data))
    done = run_ranks(2, cached_by_two_ranks)
    assert done.returncode == 0, done.stderr
    assert len(folders(data)) == 1
