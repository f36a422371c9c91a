"""Loads the embeddings of a split in one pass into one contiguous tensor per role, with rows aligned by `sample_id`.

1. Rank 0 finds the files of each source and the length of its vectors.
2. The ranks of each node read disjoint files and row groups in parallel, straight into tensors that they share. So
   each vector is read once per node.
3. Rank 0 checks the ids that the ranks of its node have read: which occur twice, and which are missing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from fusion import log, signals, storage
from fusion.data.inputs import Sources, find_sources, sources_folder
from fusion.data.node_rows import NodeRows
from fusion.data.row_cache import Allocate, CacheFolder, Kinds, Loaded, kept_rows
from fusion.data.row_store import RowStore, SourceArrays
from fusion.data.shared_memory import node_tensor
from fusion.data.source_file import Kind, Part, content_of, kind_of, open_part, parts_of
from fusion.data.source_rows import NO_ROW, Found, Rows, Window, check_ids
from fusion.distributed.world import World
from fusion.environment import usable_memory
from fusion.errors import ConfigError, DataError, StopRequested, UnreachableError
from fusion.storage import Entry

N_THREADS = 4  # of each rank; reading waits for the store more than for the CPU
N_COMPARED = 1000  # rows that are compared to find out whether two sources have the same vectors
CHECK_SECONDS = 0.5  # while reading, time between two exchanges of errors and stop requests among the ranks


@dataclass(frozen=True)
class Plan:
    """What is known about a source before its vectors are read.

    Attributes:
        source: its description in messages.
    """

    role: str
    source: str
    kind: Kind
    parts: list[Part]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.kind.dtype == "float16" else torch.float32


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
    cache: str | None = None,
    nodes: NodeRows | None = None,
) -> RowStore:
    """Loads the embeddings of the rows `ids`, in this order. Every rank calls this.

    Args:
        bindings: role to the name of its source.
        max_missing: largest share of the rows that a source may lack.
        partial: whether `ids` are only some of the table's ids; then other ids in a source are not logged.
        sources: role to its files, if they are already known.
        cache: folder on this machine's disk in which the rows are kept, see `row_cache`; None: they are kept in memory.
        nodes: the rows that each node loads; None: all rows. Cannot be combined with `cache`.

    Raises:
        ConfigError: the rows do not fit in memory, or the cache cannot be written.
        DataError: a source is missing, unreadable, inconsistent, or lacks too many rows, or an id occurs twice.
        UnreachableError: a source was written while it was read.
        StopRequested: one of the ranks was asked to stop.
    """
    world.together(stop_if_asked)
    files = sources or world.on_main(lambda: find_sources(data, split, bindings))

    def read(allocate: Allocate) -> Loaded:
        loaded = _read(data, split, bindings, files, ids, max_missing, allocate, world, nodes)
        check_unchanged(data, split, bindings, files, world)
        return loaded

    if cache is None:
        loaded = read(_in_memory(world, nodes))
    else:
        loaded = kept_rows(CacheFolder.of(cache, [data, split, dict(bindings), partial], files, ids), read, world)

    def tell() -> None:
        report(bindings, loaded.arrays, {} if partial else loaded.n_unknown, ids, max_missing)
        warn_of_equal_sources(bindings, loaded.store)

    world.on_main(tell)
    return loaded.store


def check_unchanged(data: str, split: str, bindings: Mapping[str, str], files: Sources, world: World) -> None:
    """Raises UnreachableError if a source was written since its files were listed."""
    if world.on_main(lambda: find_sources(data, split, bindings)) != files:
        message = f"embeddings of {split} in {data} changed while they were read"
        raise UnreachableError(message, "run it again once they are complete")


def _read(
    data: str,
    split: str,
    bindings: Mapping[str, str],
    files: Sources,
    ids: pd.Index,
    max_missing: float,
    allocate: Allocate,
    world: World,
    nodes: NodeRows | None,
) -> Loaded:
    """Reads the sources into new arrays; arguments as for `load`."""
    kept: dict[str, bytes] = {}
    plans = world.on_main(lambda: plans_of(data, split, bindings, files, kept))
    arrays = allocate(len(ids), {plan.role: (plan.kind.dim, plan.dtype) for plan in plans})
    rows = Rows(ids)
    found = fill(plans, rows, arrays, kept, world, nodes)
    # Every node reads all ids, so those from one node suffice: those of the first node, where rank == local_rank.
    read = world.gather_on_main(found if world.rank == world.local_rank else {})
    n_unknown = world.on_main(lambda: _n_unknown(plans, read, rows, max_missing))
    if nodes is not None:
        _share_flags(arrays, world)
    return Loaded(RowStore.of(arrays, nodes), arrays, n_unknown)


def _share_flags(arrays: Mapping[str, SourceArrays], world: World) -> None:
    """Sets the flags of rows that other nodes have read."""
    for one in arrays.values():
        for flags in (one.present, one.zeros):
            united = world.united(flags)
            if world.local_rank == 0:
                flags.copy_(united)
    world.together(lambda: None)  # until here, other ranks of this node might read flags that are not set yet


def _in_memory(world: World, nodes: NodeRows | None) -> Allocate:
    """Allocates arrays that the ranks of a node share."""

    def allocate(n_rows: int, kinds: Kinds) -> dict[str, SourceArrays]:
        n_held = n_rows if nodes is None else len(nodes)
        row_bytes = sum(dim * dtype.itemsize for dim, dtype in kinds.values())
        world.together(lambda: _check_memory(n_held * row_bytes, divided=nodes is not None))
        return {role: one(n_rows, n_held, *kind) for role, kind in kinds.items()}

    def one(n_rows: int, n_held: int, dim: int, dtype: torch.dtype) -> SourceArrays:
        present, zeros, known = (node_tensor((n_rows,), torch.bool, world) for _ in range(3))
        return SourceArrays(node_tensor((n_held, dim), dtype, world), present, zeros, known)

    return allocate


def _check_memory(n_bytes: int, *, divided: bool) -> None:
    """Args: divided: whether the bytes are only this node's share of the rows."""
    usable = usable_memory()
    if n_bytes > usable:
        raise ConfigError(
            f"the embeddings take {n_bytes / 2**30:.1f} GiB of memory, and this job may use {usable / 2**30:.1f} GiB",
            "start more nodes" if divided else "read them from a disk of this machine while training: --cache FOLDER",
        )


def stop_if_asked() -> None:
    """Raises StopRequested if this rank was asked to stop. For phases that have nothing to commit."""
    if signals.requested():
        message = "stopped on request while the input was read; nothing was done yet"
        raise StopRequested(message, "run the same command again")


def plans_of(
    data: str, split: str, bindings: Mapping[str, str], files: Sources, kept: dict[str, bytes] | None = None
) -> list[Plan]:
    """Reads what must be known of each source before its vectors are read.

    Args:
        kept: takes the content of small files that were fetched for this, by URL.
    """
    kept = {} if kept is None else kept
    where = sources_folder(data, split)
    return [_plan(role, f"source {name!r} in {where}", files[role], kept) for role, name in bindings.items()]


def _plan(role: str, source: str, files: Sequence[Entry], kept: dict[str, bytes]) -> Plan:
    with ThreadPoolExecutor(N_THREADS) as pool:
        parts = [part for found in pool.map(_parts_of, files) for part in found]
    return Plan(role, source, _first_kind(source, len(files), parts, kept), parts)


def _parts_of(entry: Entry) -> list[Part]:
    stop_if_asked()
    return parts_of(entry)


def _first_kind(source: str, n_files: int, parts: Iterable[Part], kept: dict[str, bytes]) -> Kind:
    """The kind of the source's first vectors. Small files that were fetched for this stay in `kept`, for later."""
    for part in parts:
        stop_if_asked()
        content = content_of(part)
        if content is not None:
            kept[part.url] = content
        kind = kind_of(part, content)
        if kind is not None:
            return kind
    raise DataError(f"{source} has no vectors in its {n_files} files", "write the embeddings again")


@dataclass
class _Counter:
    """Bytes of the vectors that all threads of a rank have read; only shown, so a lost addition does not matter."""

    n_bytes: int = 0


def fill(
    plans: Sequence[Plan],
    rows: Rows | Window,
    arrays: Mapping[str, SourceArrays],
    kept: dict[str, bytes],
    world: World,
    nodes: NodeRows | None = None,
) -> dict[str, Found]:
    """Reads this rank's share of all parts into the arrays, and returns the ids that it has read, by role."""
    tasks = [(plan, part) for plan in plans for part in plan.parts][world.local_rank :: world.local_size]
    given_up = threading.Event()
    counted = _Counter()
    n_bytes = sum(one.values.nbytes for one in arrays.values()) // world.local_size

    def read(task: tuple[Plan, Part]) -> Found:
        plan, part = task
        content = kept.pop(part.url, None) or content_of(part)
        mine = arrays[plan.role]
        return storage.retrying(
            part.url, lambda: _read_part(part, plan.kind, content, rows, mine, given_up, nodes, counted)
        )

    def is_reading() -> bool:
        """Waits for some time. Raises the first error of a reader, and whether this rank was asked to stop."""
        done, left = wait(reading, CHECK_SECONDS, FIRST_EXCEPTION)
        for part in done:
            part.result()
        stop_if_asked()
        show(min(counted.n_bytes, n_bytes))
        return bool(left)

    with (
        log.progress("reading embeddings", n_bytes, unit="bytes", delay=log.SLOW_SECONDS) as show,
        ThreadPoolExecutor(N_THREADS) as pool,
    ):
        reading = [pool.submit(read, task) for task in tasks]
        try:
            while any(world.exchange(world.together(is_reading))):  # an error on one rank is raised on all
                pass
        finally:
            given_up.set()
            pool.shutdown(cancel_futures=True)
    found = [(plan.role, part.result()) for (plan, _), part in zip(tasks, reading, strict=True)]
    return {plan.role: Found.joined([part for role, part in found if role == plan.role]) for plan in plans}


def _read_part(
    part: Part,
    kind: Kind,
    content: bytes | None,
    rows: Rows | Window,
    arrays: SourceArrays,
    given_up: threading.Event,
    nodes: NodeRows | None,
    counted: _Counter,
) -> Found:
    if given_up.is_set():  # before the first try or a retry
        return Found.joined([])
    with open_part(part, kind, content) as (ids, batches):
        found = rows.find(ids)
        arrays.known.numpy()[found.known] = True
        first, end = (0, len(rows)) if nodes is None else (nodes.first, nodes.end)
        wanted = np.where((found.rows >= first) & (found.rows < end), found.rows, NO_ROW)
        if nodes is not None and (wanted == NO_ROW).all():
            return found  # without its vectors
        for vectors, positions in batches:
            if given_up.is_set():
                break
            store_vectors(vectors, wanted[positions], arrays, first)
            counted.n_bytes += int((wanted[positions] != NO_ROW).sum()) * arrays.values[:1].nbytes
        return found


def store_vectors(vectors: np.ndarray, rows: np.ndarray, arrays: SourceArrays, first: int = 0) -> None:
    """Writes vectors [M, D] into these rows [M]. Vectors that are not finite or all zeros stay missing.

    Args:
        first: the row that the first vector of the arrays belongs to.
    """
    values = arrays.values.numpy()
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, and counts as not finite
        vectors = vectors.astype(values.dtype, copy=False)
    largest = _largest_bits(vectors)
    known, empty = rows != NO_ROW, largest == 0  # many extractors write zeros where there was no image or text
    good = known & ~empty & (largest < np.array(np.inf, values.dtype).view(largest.dtype))
    values[rows[good] - first] = vectors if good.all() else vectors[good]
    arrays.present.numpy()[rows[good]] = True
    arrays.zeros.numpy()[rows[known & empty]] = True


def _largest_bits(vectors: np.ndarray) -> np.ndarray:
    """[M] for each vector, the bits of its largest absolute value, as unsigned integers.

    They are ordered as the values are, with infinity and then NaN above all numbers. So one pass shows whether a vector
    is zero and whether it is finite, five times as fast for float16 as `np.isfinite`.
    """
    bits = vectors.view(f"u{vectors.itemsize}")
    largest: np.ndarray = (bits & (np.iinfo(bits.dtype).max >> 1)).max(1)
    return largest


def _n_unknown(
    plans: Iterable[Plan], read: Iterable[Mapping[str, Found]], rows: Rows, max_missing: float
) -> dict[str, int]:
    """Joins what the ranks have read into all ids of each source, checks them, and counts those that no row has."""
    everything = {plan.role: Found.joined([seen[plan.role] for seen in read if seen]) for plan in plans}
    for plan in plans:
        check_ids(plan.role, plan.source, everything[plan.role], rows, max_missing)
    return {role: len(found.unknown) for role, found in everything.items()}


def report(
    bindings: Mapping[str, str],
    arrays: Mapping[str, SourceArrays],
    n_unknown: Mapping[str, int],
    ids: pd.Index,
    max_missing: float,
) -> None:
    """Logs how many of the rows `ids` each source has, and what is wrong with others.

    Args:
        n_unknown: role to the number of its ids that the table does not have; without it, they are not logged.

    Raises:
        DataError: a source lacks too many rows.
    """
    for role, name in bindings.items():
        mine = arrays[role]
        present, empty, has_id = mine.present.numpy(), mine.zeros.numpy(), mine.known.numpy()
        broken, missing = ids[has_id & ~present & ~empty], ids[~has_id]
        n_present, dim = int(present.sum()), mine.values.shape[1]
        log.info(event="loaded", role=role, source=name, rows=n_present, missing=len(missing), dim=dim)
        if n_unknown.get(role):
            log.info(event="ids_not_in_table", role=role, rows=n_unknown[role])
        if empty.any():
            first = ",".join(ids[empty][:5])
            log.warning(event="vectors_of_zeros", role=role, rows=int(empty.sum()), first=first, counted="as missing")
        if len(broken):
            log.warning(event="not_finite", role=role, rows=len(broken), first=",".join(broken[:5]))
        if len(ids) - n_present > max_missing * len(ids):
            raise DataError(
                f"source {name!r} ({role}) has usable embeddings for {n_present} of {len(ids)} rows, without: "
                f"{', '.join(ids[~present][:5])}",
                f"complete the source, or accept more than {max_missing:.0%} missing rows with --max-missing",
            )
    n_empty = int((~torch.stack([arrays[role].present for role in bindings]).any(0)).sum())
    if n_empty:
        log.warning(event="rows_without_any_embedding", rows=n_empty, predicted="the training median")


def warn_of_equal_sources(bindings: Mapping[str, str], store: RowStore) -> None:
    """Warns if two roles have the same vectors: one source bound to both, or two files with the same content."""
    for first, second in combinations(store.values, 2):
        if store.dims[first] != store.dims[second]:
            continue
        both = store.own(torch.nonzero(store.present[first] & store.present[second]).squeeze(1)[:N_COMPARED])
        if len(both) and torch.equal(store.held(first, both).float(), store.held(second, both).float()):
            log.warning(
                event="same_vectors",
                roles=f"{first},{second}",
                sources=f"{bindings[first]},{bindings[second]}",
                hint="give each role a source of its own",
            )
