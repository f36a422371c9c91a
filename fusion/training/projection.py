"""Projects all rows on the model's principal components before the first step, instead of in every step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fusion import log
from fusion.config import RunConfig
from fusion.data.embeddings import stop_if_asked
from fusion.data.mapped_file import MappedFile
from fusion.data.row_store import RowStore
from fusion.data.shared_memory import node_file, node_tensor
from fusion.distributed.world import World
from fusion.nn.price_model import PriceModel

CHUNK = 1024  # rows per pass, so that memory stays bounded; also the unit that the ranks of a node divide


def projected(config: RunConfig, model: PriceModel, store: RowStore, world: World) -> RowStore:
    """Returns the rows as the model's networks get them. The model is in CPU memory, and has its components.

    The ranks of a node compute them together. Rows that are mapped from files are projected into another file, which is
    removed at the end of the job.
    """
    started, values, maps = time.monotonic(), {}, dict[str, MappedFile]()
    for role, components in model.components().items():
        shape = store.n_held, components.shape[1]
        if config.cache is not None and store.exceeds_memory(config.residency):
            maps[role] = node_file(shape, torch.float32, world, config.cache)
            values[role] = maps[role].tensor
        else:
            values[role] = node_tensor(shape, torch.float32, world)
    raw, first = store.of_roles(store.values), store.first_held

    def fill() -> None:
        for rows in held_chunks(store, world):
            stop_if_asked()
            batch = raw.batch(rows, torch.device("cpu"))
            for role, found in model.inputs(batch.inputs, batch.present).items():
                values[role][rows[0] - first : rows[-1] + 1 - first] = found

    with torch.inference_mode():
        world.together(fill)
    log.info(event="projected", rows=len(store), seconds=time.monotonic() - started)
    return replace(store, values=values, maps=maps, is_projected=True)


def held_chunks(store: RowStore, world: World) -> Iterator[Tensor]:
    """Yields the chunks of the rows held by this node that this rank computes for it."""
    yield from (chunk + store.first_held for chunk in own_chunks(store.n_held, world))


def own_chunks(n_rows: int, world: World) -> Iterator[Tensor]:
    """Yields the chunks of rows that this rank computes for its node.

    Rows are divided into the same chunks for any number of ranks, so that results do not depend on it.
    """
    yield from torch.split(torch.arange(n_rows), CHUNK)[world.local_rank :: world.local_size]
