"""The order of an epoch: which rows come when."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch

from fusion.config import RunConfig, Shuffle
from fusion.data.node_rows import NodeRows
from fusion.distributed.world import World
from fusion.errors import ConfigError
from fusion.training import order
from fusion.training.order import batches_read_together, check_nodes, epoch_batches, epoch_order
from fusion.training.seeds import derived_seed

TRAIN = torch.arange(0, 3000, 3)[:997]  # awkward for the blocks of 32 rows in these tests


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BLOCK", 32)
    monkeypatch.setattr(order, "WINDOW", 4)


@pytest.mark.parametrize("shuffle", get_args(Shuffle))
def test_each_row_comes_once_in_an_order_of_seed_and_epoch(shuffle: Shuffle) -> None:
    first = epoch_order(TRAIN, shuffle, 1, 1)
    assert torch.equal(first.sort().values, TRAIN)
    torch.rand(1)  # the state of torch's own generator does not matter
    assert torch.equal(first, epoch_order(TRAIN, shuffle, 1, 1))
    assert not torch.equal(first, epoch_order(TRAIN, shuffle, 1, 2))
    assert not torch.equal(first, epoch_order(TRAIN, shuffle, 2, 1))


def test_the_order_of_rows_is_that_of_earlier_versions() -> None:
    generator = torch.Generator().manual_seed(derived_seed(41, "order", 3))
    assert torch.equal(epoch_order(TRAIN, "rows", 41, 3), TRAIN[torch.randperm(997, generator=generator)])


def test_a_window_mixes_whole_blocks_in_any_order() -> None:
    found = epoch_order(torch.arange(32 * 32), "blocks", 1, 1) // 32  # the block of each row
    windows = [window.tolist() for window in torch.split(found, 4 * 32)]
    assert all(Counter(window) == dict.fromkeys(window, 32) for window in windows)
    assert sorted(set(windows[0])) != [0, 1, 2, 3]
    assert all(len(set(window[:16])) == 4 for window in windows), "the first rows of a window are of all its blocks"


def test_fewer_rows_than_a_block() -> None:
    assert sorted(epoch_order(TRAIN[:7], "blocks", 1, 1).tolist()) == TRAIN[:7].tolist()


def test_a_window_is_read_together() -> None:
    assert batches_read_together("rows", 64) == 1
    assert [batches_read_together("blocks", size) for size in (1, 32, 100, 500)] == [128, 4, 2, 1]


# Three nodes of 2, 1 and 2 ranks.
STARTS, RANKS = (0, 1200, 1800, 3000), (0, 2, 3, 5)
WORLDS = [
    World(rank, 5, *local, torch.device("cpu")) for rank, local in enumerate([(0, 2), (1, 2), (0, 1), (0, 2), (1, 2)])
]
NODES = [NodeRows(STARTS, RANKS, node) for node in (0, 0, 1, 2, 2)]


@pytest.mark.parametrize("size", [9, 64, 250])
def test_each_rank_draws_the_rows_of_its_node(size: int) -> None:
    config = RunConfig(batch_size=size, shuffle="blocks")
    of_ranks = [epoch_batches(config, TRAIN, 1, *place) for place in zip(WORLDS, NODES, strict=True)]
    drawn = []
    for batches in zip(*of_ranks, strict=True):
        assert len(batches[0].rows) <= size + 2, "the shares of the nodes are rounded"
        assert all(torch.equal(batch.rows, batches[0].rows) for batch in batches)
        for batch, nodes in zip(batches, NODES, strict=True):
            rows = batch.rows[batch.part]
            assert len(rows) and ((rows >= nodes.first) & (rows < nodes.end)).all()
        parts = [batch.rows[batch.part] for batch in batches if not batch.is_spare]
        assert torch.equal(torch.cat(parts), batches[0].rows)
        drawn.append(batches[0].rows)
    assert torch.equal(torch.cat(drawn).sort().values, TRAIN)
    shares = torch.tensor([len(NODES[2].own(rows.sort().values)) / len(rows) for rows in drawn])
    assert (shares - len(NODES[2].own(TRAIN)) / len(TRAIN)).abs().max() < 1.5 / min(map(len, drawn))


def test_the_batches_of_nodes_depend_on_seed_and_epoch_and_not_on_the_ranks() -> None:
    def rows(seed: int, epoch: int, place: int) -> list[int]:
        batches = epoch_batches(RunConfig(seed=seed), TRAIN, epoch, WORLDS[place], NODES[place])
        return torch.cat([batch.rows for batch in batches]).tolist()

    assert rows(1, 1, 0) == rows(1, 1, 4)
    assert rows(1, 1, 0) != rows(1, 2, 0) and rows(1, 1, 0) != rows(2, 1, 0)


def test_a_node_with_too_few_training_rows_is_refused() -> None:
    check_nodes(RunConfig(batch_size=9), TRAIN, NODES[0])
    with pytest.raises(
        ConfigError, match="node 1 of 3 holds 5 training rows, expected at least one for each of the 45"
    ):
        check_nodes(RunConfig(batch_size=9), torch.cat([TRAIN[:300], TRAIN[500:505], TRAIN[700:800]]), NODES[0])
