"""Which rows each node holds with `--shard-rows`, and how the nodes combine what they hold.

Without that flag, every node holds all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusion.distributed.world import World
from fusion.errors import ConfigError

CHUNK = 4096  # rows sent at a time between nodes: a few MB


@dataclass(frozen=True)
class NodeRows:
    """The contiguous rows that each node holds, in the order of the nodes.

    Attributes:
        starts: the first row of each node, and the number of all rows.
        ranks: the first rank of each node, and the number of all ranks.
        node: number of this node.
    """

    starts: tuple[int, ...]
    ranks: tuple[int, ...]
    node: int

    @classmethod
    def of(cls, n_rows: int, world: World) -> NodeRows:
        """Divides the rows between the nodes in proportion to their ranks. All ranks call this.

        Raises:
            ConfigError: there are fewer rows than nodes.
        """
        firsts = sorted(set(world.exchange(world.rank - world.local_rank)))
        ranks = (*firsts, world.size)
        found = cls(
            tuple(n_rows * rank // world.size for rank in ranks), ranks, firsts.index(world.rank - world.local_rank)
        )
        if any(start == end for start, end in zip(found.starts, found.starts[1:], strict=False)):
            raise ConfigError(
                f"{n_rows} rows cannot be divided between {found.n_nodes} nodes", "leave out --shard-rows"
            )
        return found

    @property
    def n_nodes(self) -> int:
        return len(self.ranks) - 1

    @property
    def first(self) -> int:
        """The first row of this node."""
        return self.starts[self.node]

    @property
    def end(self) -> int:
        """The row after the last one of this node."""
        return self.starts[self.node + 1]

    def __len__(self) -> int:
        """Number of rows that this node holds."""
        return self.end - self.first

    def divided(self, rows: Tensor) -> list[Tensor]:
        """Splits ascending rows [n] into those of each node."""
        cuts = torch.searchsorted(rows, torch.tensor(self.starts[1:-1], dtype=rows.dtype))
        return list(torch.tensor_split(rows, cuts))

    def own(self, rows: Tensor) -> Tensor:
        """Those of ascending rows [n] that this node holds."""
        return self.divided(rows)[self.node]

    def share(self, rows: Tensor, world: World) -> Tensor:
        """This rank's contiguous share of the node's own part of ascending rows [n]."""
        own = self.own(rows)
        return own[part_of_node(len(own), world)]

    def summed(self, compute: Callable[[], Tensor], world: World) -> Tensor:
        """Sum of the tensors that the first rank of each node computes, in the order of the nodes, on every rank."""
        parts = _of_nodes(compute, world)
        return torch.from_numpy(world.on_main(lambda: sum(parts)))

    def joined(self, compute: Callable[[], Tensor], world: World) -> Tensor | None:
        """On rank 0, the concatenation of what the first rank of each node computes; None on other ranks."""
        parts = _of_nodes(compute, world)
        return torch.from_numpy(np.concatenate(parts)) if parts else None

    def on_main(self, values: Tensor, rows: Tensor, world: World) -> Iterator[Tensor]:
        """Yields the values of ascending rows [n] on rank 0, in chunks. Other ranks yield nothing, and send theirs.

        All ranks must exhaust the iterator, and must not fail before its end: nodes wait for one another in it.

        Args:
            values: [n_own, …] of the rows that this node holds.
        """
        for chunk in torch.split(rows, CHUNK):
            for first_rank, part in zip(self.ranks, self.divided(chunk), strict=False):
                if not len(part):
                    continue
                if world.is_main and first_rank > 0:
                    yield torch.from_numpy(world.receive(first_rank))
                elif world.is_main:
                    yield values[part - self.first]
                elif world.rank == first_rank:
                    world.send_to_main(values[part - self.first].numpy())

    def complete(self, values: Tensor, world: World) -> None:
        """Fills in the rows of other nodes in [N, …], which the ranks of each node share. All ranks call this."""
        for node, first_rank in enumerate(self.ranks[:-1]):
            for start in range(self.starts[node], self.starts[node + 1], CHUNK):
                rows = slice(start, min(start + CHUNK, self.starts[node + 1]))
                sent = world.broadcast_from(first_rank, values[rows])
                if node != self.node and world.local_rank == 0:
                    values[rows] = sent
        world.together(lambda: None)  # until here, other ranks of this node might read rows that are not filled in


def _of_nodes(compute: Callable[[], Tensor], world: World) -> list[np.ndarray]:
    """On rank 0, what the first rank of each node computes, in the order of the nodes; empty on other ranks."""
    own = world.together(lambda: compute().numpy() if world.local_rank == 0 else None)
    return [part for part in world.gather_on_main(own) if part is not None]


def part_of_node(n: int, world: World) -> slice:
    """This rank's contiguous share of `n` rows that the ranks of its node divide."""
    return slice(n * world.local_rank // world.local_size, n * (world.local_rank + 1) // world.local_size)
