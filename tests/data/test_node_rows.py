"""Nodes that each hold some of the rows: what they load, send to one another and compute together."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fusion.config import RunConfig
from fusion.data import embeddings, node_rows, source_file
from fusion.data.embeddings import load
from fusion.data.node_rows import NodeRows
from fusion.data.row_store import RowStore
from fusion.distributed.world import World, join_world
from fusion.errors import ConfigError
from tests.data.test_embeddings import source, vectors, write
from tests.forked import run_ranks

N = 50


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source without a vector of row 0; those of rows 3, 4 and 40 to 44 are of zeros or not finite."""
    values = vectors(N)
    values[[2, 39, 40]], values[[3, 41, 42, 43], 0] = 0, np.nan
    write(source(tmp_path), list(range(1, N + 1)), values, rows=7)
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


def read(world: World, nodes: NodeRows | None = None) -> RowStore:
    ids = pd.Index([str(i) for i in range(N)])
    return load(os.environ["DATA"], "train", {"a": "s"}, ids, world, nodes=nodes)


def rows_of_two_nodes(world: World) -> None:
    node_rows.CHUNK = 7
    nodes = NodeRows.of(N, world)
    assert nodes.starts == (0, 25, 50) and nodes.ranks == (0, 2, 4) and nodes.node == world.rank // 2
    whole, some = read(world), read(world, nodes)
    assert torch.equal(some.present["a"], whole.present["a"])
    assert torch.equal(some.values["a"], whole.values["a"][nodes.first : nodes.end])
    rows = torch.tensor([24, 26, 3, 45])
    own = nodes.own(rows.sort().values)
    assert torch.equal(some.batch(own, world.device).inputs["a"], whole.batch(own, world.device).inputs["a"])
    chosen = torch.tensor([1, 4, 24, 25, 26, 49])
    assert some.nodes_digest(world) == whole.digest or not world.is_main
    assert some.nodes_digest(world, chosen) == whole.digest_of(chosen) or not world.is_main
    assert nodes.summed(lambda: torch.tensor([1.0 + nodes.node]), world).item() == 3
    joined = nodes.joined(lambda: torch.arange(nodes.first, nodes.end), world)
    assert (joined is None) != world.is_main and (joined is None or joined.tolist() == list(range(N)))
    shares = world.exchange(nodes.share(chosen, world).tolist())
    assert [row for share in shares for row in share] == chosen.tolist()
    filled = torch.zeros(N, 3, dtype=torch.float16)  # each rank has its own copy, so that the first of a node fills it
    filled[nodes.first : nodes.end] = 1 + nodes.node
    nodes.complete(filled, world)
    assert world.local_rank or filled[:, 2].tolist() == [1] * 25 + [2] * 25


def test_two_nodes_hold_half_of_the_rows_each(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_TEST_RANKS_PER_NODE", "2")
    done = run_ranks(4, rows_of_two_nodes)
    assert done.returncode == 0, done.stderr
    assert "rows=42 missing=1 dim=" in done.stderr, "rank 0 counts the rows of all nodes"


def test_a_node_reads_no_vectors_of_parts_without_its_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_read, original = [], embeddings.store_vectors

    def store(found: np.ndarray, *more: object) -> None:
        n_read.append(len(found))
        original(found, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(embeddings, "store_vectors", store)
    monkeypatch.setattr(source_file, "STREAM_BYTES", 64)  # so that the file is read by row groups
    with join_world("cpu") as world:
        first = NodeRows((0, 20, N), (0, 1, 2), 0)
        found = read(world, first)
    assert found.values["a"].shape == (20, 5)
    assert sum(n_read) == 21, "three groups of seven rows have the rows from 1 to 19"


def test_only_the_share_of_a_node_has_to_fit_in_its_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = NodeRows((0, 20, N), (0, 1, 2), 0)
    with join_world("cpu") as world:
        monkeypatch.setattr(embeddings, "usable_memory", lambda: 20 * 5 * 4)
        read(world, nodes)
        with pytest.raises(ConfigError, match=r"take 0\.0 GiB of memory"):
            read(world)
        monkeypatch.setattr(embeddings, "usable_memory", lambda: 20 * 5 * 4 - 1)
        with pytest.raises(ConfigError, match=r"take 0\.0 GiB of memory") as raised:
            read(world, nodes)
    assert raised.value.remedy == "start more nodes"


def test_fewer_rows_than_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "exchange", lambda *_: [0, 1, 2])
    with pytest.raises(ConfigError, match="2 rows cannot be divided between 3 nodes"):
        NodeRows.of(2, World(0, 3, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "c"}, "--shard-rows keeps rows in memory, so it cannot be combined with --cache"),
        ({"features": ("text",)}, "--shard-rows cannot be combined with --features"),
        ({"columns": ("size",)}, "--shard-rows cannot be combined with --columns"),
    ],
)
def test_what_needs_all_rows_on_every_node_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(shard_rows=True, **settings)  # type: ignore[arg-type]
