"""Embeddings of a split as rows aligned by `sample_id`: planned from the ids, then streamed into contiguous tensors.

Rank 0 reads schemas and ids and decides which row of which file goes where. Then the ranks of a node read disjoint row
groups in parallel, straight into one tensor a role that they share, so each vector is read once a node.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusion import log, stopping, storage
from fusion.distributed import World
from fusion.errors import DataError, StopRequested, UnreachableError
from fusion.inputs import Sources, find_sources
from fusion.sharing import node_tensor
from fusion.source_file import Header, read_header, read_vectors
from fusion.source_plan import Piece, Rows, SourcePlan, plan_source
from fusion.storage import Entry

N_THREADS = 4
DIGEST_ROWS = 4096  # rows brought to float32 at a time
N_COMPARED = 1000  # rows that are compared to see whether two sources are the same
LOOK = 0.5  # seconds between two moments at which the ranks tell one another of errors and stop requests


@dataclass(frozen=True)
class RowStore:
    """Embeddings of N rows, resident; batches are gathered by row.

    Attributes:
        values: role to [N, D_role], float16 or float32; zeros where the role is missing.
        present: role to [N] bool.
    """

    values: dict[str, Tensor]
    present: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    @property
    def dims(self) -> dict[str, int]:
        return {role: values.shape[1] for role, values in self.values.items()}

    def batch(self, rows: Tensor, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs ({role: [B, D_role]} float32) and presence ({role: [B]} bool) of the rows with these positions."""
        rows = rows.to(next(iter(self.present.values())).device)
        inputs = {role: values.index_select(0, rows).to(device).float() for role, values in self.values.items()}
        return inputs, {role: present.index_select(0, rows).to(device) for role, present in self.present.items()}

    def resident_on(self, device: torch.device) -> RowStore:
        """The same rows in the device's memory, or as they are where they would fill more than half of what is free."""
        n_bytes = sum(values.nbytes for values in self.values.values())
        if device.type != "cuda" or n_bytes > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return RowStore(_moved(self.values, device), _moved(self.present, device))

    def any_present(self) -> Tensor:
        """[N] bool: the row has at least one embedding."""
        return torch.stack(list(self.present.values())).any(0)

    def digest(self) -> str:
        """sha256 of all values and of what is present: the same for the same rows, whatever files they came from."""
        total = hashlib.sha256()
        for role in sorted(self.values):
            total.update(role.encode())
            total.update(self.present[role].numpy().tobytes())
            total.update(self.values[role].numpy().data.cast("B"))
        return total.hexdigest()

    def digest_of(self, rows: Tensor) -> str:
        """sha256 of these rows, in their order: values as float32, whatever the files had, and what is present."""
        total = hashlib.sha256()
        for role in sorted(self.values):
            total.update(role.encode())
            total.update(self.present[role][rows].numpy().tobytes())
            for chunk in torch.split(rows, DIGEST_ROWS):
                total.update(self.values[role][chunk].float().numpy().data.cast("B"))
        return total.hexdigest()


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {role: tensor.to(device) for role, tensor in tensors.items()}


@dataclass(frozen=True)
class Target:
    """Where the vectors of a role go: values [N, D], and whether a row [N] is present, or has a vector of zeros."""

    values: np.ndarray
    present: np.ndarray
    zeros: np.ndarray


def load(
    data: str,
    split: str,
    bindings: Mapping[str, str],
    ids: pd.Index,
    world: World,
    *,
    max_missing: float = 1.0,
    partial: bool = False,
    sources: Sources | None = None,
) -> RowStore:
    """Embeddings of the rows `ids`, in this order.

    Args:
        bindings: role to the name of its source.
        max_missing: largest share of the rows that a source may lack.
        partial: `ids` are only some of the table's, so that others in a source are no surprise.
        sources: role to its files, if they were looked for before.

    Raises:
        DataError: a source that is missing, unreadable, inconsistent, or lacks too many rows; ids that occur twice.
        UnreachableError: a source was written meanwhile.
        StopRequested: one of the ranks was asked to stop.
    """
    world.together(_stop_if_asked)
    files = sources or world.on_main(lambda: find_sources(data, split, bindings))
    where = storage.join(data, "embeddings", split)
    plans = world.on_main(lambda: _plans(files, bindings, where, Rows.of(ids, max_missing), world.local_size))
    shape = {plan.role: (len(ids), plan.dim) for plan in plans}
    values = {plan.role: node_tensor(shape[plan.role], plan.dtype, world) for plan in plans}
    present = {plan.role: node_tensor((len(ids),), torch.bool, world) for plan in plans}
    zeros = {plan.role: node_tensor((len(ids),), torch.bool, world) for plan in plans}
    _fill(
        plans,
        {role: Target(values[role].numpy(), present[role].numpy(), zeros[role].numpy()) for role in values},
        world,
    )
    if world.on_main(lambda: find_sources(data, split, bindings)) != files:
        raise UnreachableError(
            f"embeddings of {split} in {data} were written while they were read", "run it again once they are complete"
        )
    store = RowStore(values, present)
    world.on_main(lambda: _report(plans, bindings, store, zeros, ids, max_missing, partial))
    return store


def _stop_if_asked() -> None:
    if stopping.requested():
        message = "stopped on request while the input was read; nothing was done yet"
        raise StopRequested(message, "run the same command again")


def _plans(files: Sources, bindings: Mapping[str, str], where: str, rows: Rows, n_readers: int) -> list[SourcePlan]:
    return [_plan(role, f"source {name!r} in {where}", files[role], rows, n_readers) for role, name in bindings.items()]


def _plan(role: str, source: str, files: Sequence[Entry], rows: Rows, n_readers: int) -> SourcePlan:
    with ThreadPoolExecutor(N_THREADS) as pool:
        headers = list(pool.map(_read_header, files))
    return plan_source(role, source, headers, rows, N_THREADS * n_readers)


def _read_header(entry: Entry) -> Header:
    _stop_if_asked()
    return read_header(entry.url, entry.size)


def _fill(plans: Iterable[SourcePlan], targets: Mapping[str, Target], world: World) -> None:
    tasks = [(plan, piece) for plan in plans for piece in plan.pieces][world.local_rank :: world.local_size]
    given_up = threading.Event()

    def read(task: tuple[SourcePlan, Piece]) -> None:
        plan, piece = task
        storage.retrying(piece.file.url, lambda: _read_piece(plan, piece, targets[plan.role], given_up))

    def is_reading() -> bool:
        done, left = wait(reading, LOOK, FIRST_EXCEPTION)
        for piece in done:
            piece.result()
        _stop_if_asked()
        return bool(left)

    with ThreadPoolExecutor(N_THREADS) as pool:
        reading = [pool.submit(read, task) for task in tasks]
        try:
            while any(world.exchange(world.together(is_reading))):
                pass
        finally:
            given_up.set()
            pool.shutdown(cancel_futures=True)


def _read_piece(plan: SourcePlan, piece: Piece, target: Target, given_up: threading.Event) -> None:
    if given_up.is_set():  # before a retry
        return
    for vectors, rows in read_vectors(piece.file, piece.row_groups, plan.dim):
        if given_up.is_set():
            return
        _store(vectors, piece.targets[rows], target)


def _store(vectors: np.ndarray, rows: np.ndarray, target: Target) -> None:
    """Puts vectors [M, D] into the rows [M] of a target; what is not finite, or all zeros, stays missing there."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and counts as not finite
        vectors = vectors.astype(target.values.dtype, copy=False)
    known, empty = rows >= 0, ~vectors.any(1)  # extractors write zeros where there was no image or text
    good = known & ~empty & np.isfinite(vectors).all(1)
    target.values[rows[good]] = vectors if good.all() else vectors[good]
    target.present[rows[good]] = True
    target.zeros[rows[known & empty]] = True


def _report(
    plans: Iterable[SourcePlan],
    bindings: Mapping[str, str],
    store: RowStore,
    zeros: Mapping[str, Tensor],
    ids: pd.Index,
    max_missing: float,
    partial: bool,
) -> None:
    for plan in plans:
        role, name, present = plan.role, bindings[plan.role], store.present[plan.role].numpy()
        found = np.zeros(len(ids), bool)
        for piece in plan.pieces:
            found[piece.targets[piece.targets >= 0]] = True
        empty = zeros[role].numpy()
        broken, missing = ids[found & ~present & ~empty], ids[~found]
        log.info(event="loaded", role=role, source=name, rows=int(present.sum()), missing=len(missing), dim=plan.dim)
        if plan.n_unknown and not partial:
            log.info(event="ids_not_in_table", role=role, rows=plan.n_unknown)
        if empty.any():
            first = ",".join(ids[empty][:5])
            log.warning(event="vectors_of_zeros", role=role, rows=int(empty.sum()), first=first, counted="as missing")
        if len(broken):
            log.warning(event="not_finite", role=role, rows=len(broken), first=",".join(broken[:5]))
        if len(ids) - present.sum() > max_missing * len(ids):
            raise DataError(
                f"source {name!r} ({role}) has usable embeddings for {int(present.sum())} of {len(ids)} rows, without: "
                f"{', '.join(ids[~present][:5])}",
                f"complete the source, or accept more than {max_missing:.0%} missing rows with --max-missing",
            )
    _warn_of_equal_sources(bindings, store)
    none = int((~store.any_present()).sum())
    if none:
        log.warning(event="rows_without_any_embedding", rows=none, predicted="the training median")


def _warn_of_equal_sources(bindings: Mapping[str, str], store: RowStore) -> None:
    """Warns of roles that have the same vectors: a source bound twice, or two files with the same content."""
    for first, second in combinations(store.values, 2):
        if store.dims[first] != store.dims[second]:
            continue
        both = torch.nonzero(store.present[first] & store.present[second]).squeeze(1)[:N_COMPARED]
        if len(both) and torch.equal(store.values[first][both].float(), store.values[second][both].float()):
            log.warning(
                event="same_vectors",
                roles=f"{first},{second}",
                sources=f"{bindings[first]},{bindings[second]}",
                hint="give each role a source of its own",
            )
