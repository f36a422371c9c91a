"""Computed sources as rows of the store: each node computes them once, its ranks in turn, into tensors they share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fusion.data.embeddings import stop_if_asked
from fusion.data.row_store import RowStore
from fusion.data.shared_memory import node_tensor
from fusion.distributed.world import World, held
from fusion.features.fitted import Columns, Features, row_hashes
from fusion.features.text import CHUNK_ROWS

COMPARED = "text_chars"


def with_features(
    store: RowStore, features: Features | None, columns: Columns | None, name: str, place: World
) -> RowStore:
    """The store with the computed roles after its own; the same for any number of ranks.

    Args:
        features: on every rank; None: there are none.
        columns: what they are computed from, of all rows; only on rank 0.
        name: of the table's file, for messages.

    Raises:
        DataError: a column is of another type than in training.
        StopRequested: one of the ranks was asked to stop.
    """
    if features is None:
        return store
    target = RowStore(
        {role: node_tensor((len(store), dim), _dtype(role), place) for role, dim in features.dims.items()},
        {role: node_tensor((len(store),), torch.bool, place) for role in features.dims},
        tuple(features.dims),
        node_tensor((len(store),), torch.int64, place),
    )
    for number, start in enumerate(range(0, len(store), CHUNK_ROWS)):
        _fill_chunk(target, features, columns, name, place, number, start)
    return replace(target, values=store.values | target.values, present=store.present | target.present)


def compared(store: RowStore) -> RowStore:
    """The roles by which nights are compared: those that were read, and the pieces of the texts' words.

    The texts stand under the right ids, so that embeddings under wrong ones, of all sources alike, disagree with them.
    The other computed roles say the same, or hold few different vectors.
    """
    return store.of_roles([role for role in store.values if role not in store.computed or role == COMPARED])


def _dtype(role: str) -> torch.dtype:
    return torch.float32 if role in ("text_numbers", "columns") else torch.float16


def _fill_chunk(
    target: RowStore, features: Features, columns: Columns | None, name: str, place: World, number: int, start: int
) -> None:
    """Sends a chunk of texts to all ranks; the one of each node whose turn it is computes."""
    rows = slice(start, min(start + CHUNK_ROWS, len(target)))

    def cut() -> Columns:
        taken = np.arange(rows.start, rows.stop)  # a slice would be sent with all that it is a slice of
        return {column: values.take(taken) for column, values in held(columns).items()}

    def compute() -> None:
        stop_if_asked()
        if number % place.local_size == place.local_rank:
            _fill(target, features, chunk, rows, name)

    chunk = place.on_main(cut)
    place.together(compute)


def _fill(target: RowStore, features: Features, chunk: Columns, rows: slice, name: str) -> None:
    assert target.origins is not None
    target.origins[rows] = torch.from_numpy(row_hashes(chunk).view(np.int64))
    for role, (values, is_there) in features.vectors(chunk, name).items():
        target.values[role][rows] = torch.from_numpy(np.where(is_there[:, None], values, 0)).to(_dtype(role))
        target.present[role][rows] = torch.from_numpy(np.array(is_there))
