"""The order in which an epoch visits the training rows. It depends on seed and epoch alone, and so not on the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.config import Shuffle
from fusion.training.seeds import derived_seed

# Consecutive training rows that stay together in the order of blocks. Vectors of the published encoders take 3 to 4.5
# kB each, so that a block is 3 to 4.5 MB of each source's file: a slow disk reads it as fast as it can.
BLOCK = 1024
# Blocks whose rows are mixed. A batch of 256 rows then has about 16 of each, so that neighbouring rows, which resemble
# each other in many catalogs, are a small part of it. Two windows, the one in use and the next, should fit in the page
# cache: of the four published sources, two take 520 MB.
WINDOW = 16


def epoch_order(train: Tensor, shuffle: Shuffle, seed: int, epoch: int) -> Tensor:
    """Returns `train`, ascending positions [n], in the order of an epoch.

    Args:
        shuffle: "rows": any order. "blocks": blocks of consecutive rows in any order, and any order of the rows within
            each window of blocks.
        epoch: from 1.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    if shuffle == "rows":
        return _shuffled(train, generator)
    blocks = torch.split(train, BLOCK)
    order = torch.split(torch.randperm(len(blocks), generator=generator), WINDOW)
    return torch.cat([_shuffled(torch.cat([blocks[block] for block in window]), generator) for window in order])


def batches_read_together(shuffle: Shuffle, batch_size: int) -> int:
    """Returns how many batches are read at a time so that whole blocks are read: as many as a window has."""
    return 1 if shuffle == "rows" else -(-BLOCK * WINDOW // batch_size)  # rounded up


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]
