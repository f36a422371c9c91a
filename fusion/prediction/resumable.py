"""Rows computed part by part: each part is kept once it is done, so that a stopped or killed job goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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

CHUNK = 1024  # rows a forward pass
PART_ROWS = 8 * CHUNK
_SHA256_LENGTH = 64


def compute_rows(compute: Compute, store: RowStore, rows: Tensor, device: torch.device) -> Arrays:
    """What `compute` says of the store's rows [n], name to [n, …], in their order; nothing for no rows."""
    with torch.inference_mode():
        chunks = [compute(store.batch(chunk, device)) for chunk in torch.split(rows, CHUNK) if len(chunk)]
        return {name: torch.cat([chunk[name] for chunk in chunks]).cpu().numpy() for name in (*chunks, {})[0]}


def with_beats(compute: Compute, beat: Callable[[], None]) -> Compute:
    """The same, which tells a watchdog of every chunk that this rank gets on."""

    def compute_and_beat(batch: Batch) -> Mapping[str, Tensor]:
        beat()
        return compute(batch)

    return compute_and_beat


def compute_parts(compute: Compute, store: RowStore, world: World, folder: str) -> Arrays:
    """What `compute` says of all rows of the store, name to [N, …], in their order, on rank 0; nothing on the others.

    The parts are the same for any number of ranks. One that is in `folder` is read instead of computed.

    Raises:
        StopRequested: one of the ranks was asked to stop.
    """
    parts = torch.split(torch.arange(len(store)), PART_ROWS)
    kept = set(world.on_main(lambda: storage.ls(folder)))
    if kept:
        log.info(event="resumed", parts=f"{len(kept)}/{len(parts)}", folder=folder)
    mine: dict[int, Arrays] = {}

    def do(number: int) -> None:
        url = storage.join(folder, f"{number:05d}")
        found = _read(url) if url in kept else None
        mine[number] = compute_rows(compute, store, parts[number], world.device) if found is None else found
        if found is None:
            _write(url, mine[number])

    with (
        watched(STALL_TIMEOUT, lambda: f"rank {world.rank} at part {len(mine)}") as watchdog,
        log.progress("parts", len(parts)) as show,
    ):
        compute = with_beats(compute, watchdog.beat)
        for first in range(0, len(parts), world.size):
            _stop_if_asked(world, first, len(parts))
            watchdog.beat()
            world.together(lambda number=first + world.rank: do(number) if number < len(parts) else None)  # type: ignore[misc]
            show(min(first + world.size, len(parts)))
    everything = {number: part for answer in world.gather_on_main(mine) for number, part in answer.items()}
    ordered = [everything[number] for number in sorted(everything)]
    return {name: np.concatenate([part[name] for part in ordered]) for name in (ordered[0] if ordered else {})}


def discard(folder: str) -> None:
    """Removes all parts below the folder; another attempt may be writing some, and then they stay.

    One that is under way loses nothing but time: it has its parts in memory, and computes again what it cannot read.
    """
    try:
        storage.remove(folder)
    except (FusionError, OSError) as error:
        log.warning(event="parts_left", folder=folder, reason=str(error))


def _stop_if_asked(world: World, n_done: int, n_parts: int) -> None:
    if any(world.exchange(signals.requested())):
        message = f"stopped on request, {n_done} of {n_parts} parts are done and kept"
        raise StopRequested(message, "run the same command again to go on")


def _write(url: str, arrays: Arrays) -> None:
    data = safetensors.numpy.save(arrays)
    storage.write(url, storage.sha256(data).encode() + data)


def _read(url: str) -> Arrays | None:
    """The part, or None when it is damaged, or gone because another attempt has published in the meantime."""
    try:
        content = storage.read(url)
    except DataError:
        return None
    sha256, data = content[:_SHA256_LENGTH], content[_SHA256_LENGTH:]
    return safetensors.numpy.load(data) if storage.sha256(data).encode() == sha256 else None
