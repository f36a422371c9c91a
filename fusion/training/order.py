"""The order in which an epoch visits the training rows, and which ranks compute which.

The order depends on seed and epoch alone, and so not on the ranks; with --shard-rows, also on the number of nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusion.config import RunConfig, Shuffle
from fusion.data.node_rows import NodeRows, part_of_node
from fusion.distributed.world import World
from fusion.errors import ConfigError
from fusion.training.seeds import derived_seed

# Consecutive training rows that stay together in the order of blocks. Vectors of the published encoders take 3 to 4.5
# kB each, so that a block is 3 to 4.5 MB of each source's file: a slow disk reads it as fast as it can.
BLOCK = 1024
# Blocks whose rows are mixed. A batch of 256 rows then has about 16 of each, so that neighbouring rows, which resemble
# each other in many catalogs, are a small part of it. Two windows, the one in use and the next, should fit in the page
# cache: of the four published sources, two take 520 MB.
WINDOW = 16


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of a step of all ranks together.

    Attributes:
        rows: [B] positions.
        part: the rows that this rank computes.
        is_spare: whether `part` belongs to another rank. A rank without a row of its own still has to take part in the
            exchange of gradients, so it computes such a row with a weight of 0.
    """

    rows: Tensor
    part: slice
    is_spare: bool

    @classmethod
    def of(cls, rows: Tensor, own: slice, spare: int = 0) -> GlobalBatch:
        """Args: own: this rank's rows; there may be none. spare: the row to compute then."""
        is_spare = own.start == own.stop
        return cls(rows, slice(spare, spare + 1) if is_spare else own, is_spare)

    def to(self, device: torch.device) -> GlobalBatch:
        """The same batch, whose positions are on a device."""
        return replace(self, rows=self.rows.to(device))


def n_batches(config: RunConfig, n_rows: int) -> int:
    """Returns the number of batches of an epoch of `n_rows` training rows."""
    return -(-n_rows // config.batch_size)  # rounded up


def epoch_batches(
    config: RunConfig, train: Tensor, epoch: int, world: World, nodes: NodeRows | None = None
) -> list[GlobalBatch]:
    """Returns the batches of an epoch; all ranks get the same rows.

    Args:
        train: ascending positions [n].
        epoch: from 1.
        nodes: which rows each node holds, so that each node's part of a batch is made of its own rows.
    """
    if nodes is not None:
        return _node_batches(config, nodes.divided(train), epoch, world, nodes)
    order = epoch_order(train, config.shuffle, config.seed, epoch)
    return [GlobalBatch.of(rows, world.share(len(rows))) for rows in torch.split(order, config.batch_size)]


def _node_batches(
    config: RunConfig, of_nodes: list[Tensor], epoch: int, world: World, nodes: NodeRows
) -> list[GlobalBatch]:
    """Returns the batches of an epoch in which each has the same share of every node's rows.

    As shares are rounded, batches differ by up to a row per node.
    """
    seeds = (derived_seed(config.seed, "node", node) for node in range(nodes.n_nodes))
    orders = [epoch_order(rows, config.shuffle, seed, epoch) for rows, seed in zip(of_nodes, seeds, strict=True)]
    n, found = n_batches(config, sum(map(len, orders))), []
    for batch in range(n):
        parts = [rows[len(rows) * batch // n : len(rows) * (batch + 1) // n] for rows in orders]
        first = sum(map(len, parts[: nodes.node]))
        own = part_of_node(len(parts[nodes.node]), world)
        found.append(GlobalBatch.of(torch.cat(parts), slice(first + own.start, first + own.stop), first))
    return found


def check_nodes(config: RunConfig, train: Tensor, nodes: NodeRows) -> None:
    """Raises ConfigError unless each node has a row for each batch of an epoch."""
    n = n_batches(config, len(train))
    for node, rows in enumerate(nodes.divided(train)):
        if len(rows) < n:
            raise ConfigError(
                f"node {node} of {nodes.n_nodes} holds {len(rows)} training rows, expected at least one for each of "
                f"the {n} batches of an epoch",
                "start fewer nodes, raise --batch-size, or leave out --shard-rows",
            )


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
