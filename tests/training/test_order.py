"""The order of an epoch: which rows come when."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch

from fusion.config import Shuffle
from fusion.training import order
from fusion.training.order import batches_read_together, epoch_order
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
