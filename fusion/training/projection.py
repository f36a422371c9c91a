"""Projects all rows on the model's principal components before the first step, instead of in every step."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from fusion import log
from fusion.config import RunConfig
from fusion.data.embeddings import stop_if_asked
from fusion.data.mapped_file import MappedFile
from fusion.data.row_store import RowStore
from fusion.data.shared_memory import node_file, node_tensor
from fusion.distributed.world import World
from fusion.nn.price_model import PriceModel
from fusion.training.memory_build import own_chunks


def projected(config: RunConfig, model: PriceModel, store: RowStore, world: World) -> RowStore:
    """Returns the rows as the model's networks get them; unchanged without components.

    The ranks of a node compute them together. Rows that are mapped from files are projected into another file, which is
    removed at the end of the job.
    """
    if not config.components:
        return store
    started, values, maps = time.monotonic(), {}, dict[str, MappedFile]()
    for role, components in model.components().items():
        shape = len(store), components.shape[1]
        if config.cache is not None and store.exceeds_memory(config.residency):
            maps[role] = node_file(shape, torch.float32, world, config.cache)
            values[role] = maps[role].tensor
        else:
            values[role] = node_tensor(shape, torch.float32, world)
    raw = store.of_roles(store.values)

    def fill() -> None:
        for rows in own_chunks(len(store), world):
            stop_if_asked()
            batch = raw.batch(rows, world.device)
            for role, found in model.inputs(batch.inputs, batch.present).items():
                values[role][rows[0] : rows[-1] + 1] = found.cpu()

    with torch.inference_mode():
        world.together(fill)
    log.info(event="projected", rows=len(store), seconds=time.monotonic() - started)
    return replace(store, values=values, maps=maps, is_projected=True)
