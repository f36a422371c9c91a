"""Adds computed sources to a row store. Each node computes them once; its ranks take turns and share the tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fusion.data.embeddings import stop_if_asked
from fusion.data.row_store import RowStore
from fusion.data.shared_memory import node_tensor
from fusion.distributed.world import World, held
from fusion.features.fitted import Columns, Features, row_hashes
from fusion.features.tfidf import CHUNK_ROWS

COMPARED = "text_chars"  # the computed role of which `compared` keeps the vectors


def with_features(
    store: RowStore, features: Features | None, columns: Columns | None, name: str, world: World
) -> RowStore:
    """The store with the computed roles added after its own. The result does not depend on the number of ranks.

    Args:
        features: the fitted sources, on every rank; None if there are none.
        columns: their columns of all rows; only needed on rank 0.
        name: name of the table's file, for messages.

    Raises:
        DataError: a column has values of another type than in training.
        StopRequested: one of the ranks was asked to stop.
    """
    if features is None:
        return store
    target = RowStore(
        {role: node_tensor((len(store), dim), _dtype(role), world) for role, dim in features.dims.items()},
        {role: node_tensor((len(store),), torch.bool, world) for role in features.dims},
        tuple(features.dims),
        node_tensor((len(store),), torch.int64, world),
    )
    for number, start in enumerate(range(0, len(store), CHUNK_ROWS)):
        _fill_chunk(target, features, columns, name, world, number, start)
    return replace(target, values=store.values | target.values, present=store.present | target.present)


def compared(store: RowStore) -> RowStore:
    """The store with the roles by which the embeddings of two nightly runs are compared.

    These are all roles that were read, and `text_chars`. Texts come from the table, so they belong to the right ids.
    If the embeddings of all sources stand under the same wrong ids, they do not fit the texts. The other computed roles
    would add nothing: they follow from the same texts, or have few different vectors.
    """
    return store.of_roles([role for role in store.values if role not in store.computed or role == COMPARED])


def _dtype(role: str) -> torch.dtype:
    # Quantities and numbers of columns may need more precision than the normalised vectors of terms.
    return torch.float32 if role in ("text_numbers", "columns") else torch.float16


def _fill_chunk(
    target: RowStore, features: Features, columns: Columns | None, name: str, world: World, number: int, start: int
) -> None:
    """Sends a chunk of texts to all ranks. On each node, the rank whose turn it is computes its vectors."""
    rows = slice(start, min(start + CHUNK_ROWS, len(target)))

    def cut() -> Columns:
        taken = np.arange(rows.start, rows.stop)  # copies; a slice of an Arrow array would be sent with the whole array
        return {column: values.take(taken) for column, values in held(columns).items()}

    def compute() -> None:
        stop_if_asked()
        if number % world.local_size == world.local_rank:
            _fill(target, features, chunk, rows, name)

    chunk = world.on_main(cut)
    world.together(compute)


def _fill(target: RowStore, features: Features, chunk: Columns, rows: slice, name: str) -> None:
    assert target.origins is not None
    target.origins[rows] = torch.from_numpy(row_hashes(chunk).view(np.int64))
    for role, (values, is_there) in features.vectors(chunk, name).items():
        target.values[role][rows] = torch.from_numpy(np.where(is_there[:, None], values, 0)).to(_dtype(role))
        target.present[role][rows] = torch.from_numpy(np.array(is_there))
