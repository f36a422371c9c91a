"""Resumable computation: rows are computed in parts, and each part is saved when it is done.

A job that was stopped or killed reads the saved parts and computes only the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from fusion import log, signals, storage
from fusion.data.row_store import RowStore
from fusion.distributed.watchdog import watched
from fusion.distributed.world import STALL_TIMEOUT, World
from fusion.errors import DataError, FusionError, StopRequested
from fusion.nn.batch import Batch

Compute = Callable[[Batch], Mapping[str, Tensor]]  # from B rows to {name: [B, …]}
Arrays = dict[str, np.ndarray]

CHUNK = 1024  # rows per forward pass; more hardly make it faster, but need more memory
# Rows per saved part. A killed job loses at most this much work per rank. Smaller parts would mean more requests to the
# store: 75,000 rows are 10 parts.
PART_ROWS = 8 * CHUNK
_SHA256_LENGTH = 64  # hexadecimal digits, at the start of a saved part


def compute_rows(
    compute: Compute, store: RowStore, rows: Tensor, device: torch.device, chunk: int | None = None
) -> Arrays:
    """Returns the outputs of `compute` for the rows at these positions [n] of the store, as name to [n, …].

    The result is empty if there are no rows.

    Args:
        chunk: rows per forward pass; by default `CHUNK`.
    """
    with torch.inference_mode():
        parts = [part for part in torch.split(rows, chunk or CHUNK) if len(part)]
        chunks = [compute(batch) for batch in store.batches(parts, device)]
        if not chunks:
            return {}
        return {name: torch.cat([chunk[name] for chunk in chunks]).cpu().numpy() for name in chunks[0]}


def with_beats(compute: Compute, beat: Callable[[], None]) -> Compute:
    """Wraps `compute` such that it calls `beat` for every chunk, to show the watchdog that this rank makes progress."""

    def compute_and_beat(batch: Batch) -> Mapping[str, Tensor]:
        beat()
        return compute(batch)

    return compute_and_beat


def compute_parts(
    compute: Compute, store: RowStore, world: World, folder: str, *, first_row: int = 0, n_rows: int | None = None
) -> Arrays:
    """Returns the outputs of `compute` for all rows of the store, as name to [len(store), …]; empty on ranks but 0.

    The rows are divided into the same parts for any number of ranks. A part that is saved in `folder` is read from
    there; any other part is computed and saved.

    Args:
        folder: URL. It must be different for other inputs, models or devices (see `predict.parts_folder`).
        first_row, n_rows: if the store has only some of the rows, the position of its first row, a multiple of
            `PART_ROWS`, and the number of all rows.

    Raises:
        StopRequested: one of the ranks got a signal; all ranks raise it.
    """
    parts, before = torch.split(torch.arange(len(store)), PART_ROWS), first_row // PART_ROWS
    n_parts = -(-(n_rows or len(store)) // PART_ROWS)
    saved = set(world.on_main(lambda: storage.ls(folder)))
    if saved and not before:
        log.info(event="resumed", parts=f"{len(saved)}/{n_parts}", folder=folder)
    mine: dict[int, Arrays] = {}

    def read_or_compute(number: int) -> None:
        if number >= len(parts):  # in the last round, there may be fewer parts than ranks
            return
        url = storage.join(folder, f"{before + number:05d}")
        found = _read(url) if url in saved else None
        if found is None:
            found = compute_rows(compute, store, parts[number], world.device)
            _write(url, found)
        mine[number] = found

    with (
        watched(STALL_TIMEOUT, lambda: f"rank {world.rank} at part {before + len(mine)}") as watchdog,
        log.progress("predicting", n_rows or len(store), done=first_row, unit="rows") as show,
    ):
        compute = with_beats(compute, watchdog.beat)
        for first in range(0, len(parts), world.size):
            _stop_if_asked(world, before + first, n_parts)
            watchdog.beat()
            world.together(partial(read_or_compute, first + world.rank))
            show(first_row + min((first + world.size) * PART_ROWS, len(store)))
    everything = {number: part for of_rank in world.gather_on_main(mine) for number, part in of_rank.items()}
    computed = concatenated([everything[number] for number in sorted(everything)])
    return dict(sorted(computed.items()))  # saved parts have their names in this order, computed ones in another


def concatenated(parts: Sequence[Arrays]) -> Arrays:
    """Joins parts that have the same names along their first dimension; no parts give an empty result."""
    if not parts:
        return {}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def discard(folder: str) -> None:
    """Removes all saved parts below the folder. If the store refuses, they stay, and a warning says so.

    Another job that is using the parts only loses time: it has its own parts in memory, and computes again what it can
    no longer read.
    """
    try:
        storage.remove(folder)
    except (FusionError, OSError) as error:
        log.warning(event="parts_left", folder=folder, reason=str(error).splitlines()[0])


def _stop_if_asked(world: World, n_done: int, n_parts: int) -> None:
    if any(world.exchange(signals.requested())):
        message = f"stopped on request, {n_done} of {n_parts} parts are done and kept"
        raise StopRequested(message, "run the same command again to resume")


def _write(url: str, arrays: Arrays) -> None:
    data = safetensors.numpy.save(arrays)
    storage.write(url, storage.sha256(data).encode() + data)


def _read(url: str) -> Arrays | None:
    """Reads a saved part; None if it is damaged, or if another job has published and removed it in the meantime."""
    try:
        content = storage.read(url)
    except DataError:
        return None
    sha256, data = content[:_SHA256_LENGTH], content[_SHA256_LENGTH:]
    return safetensors.numpy.load(data) if storage.sha256(data).encode() == sha256 else None
