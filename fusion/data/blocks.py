"""Reads the embeddings of a table in blocks of successive rows, so that never all of them are in memory.

This needs sources in the order of the table's ids, as `fusion.prepare` writes them: then each row group has the rows of
one or two blocks. The statistics in the footers of Parquet files show which ids a row group can have.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fusion import log
from fusion.data.embeddings import Plan, fill, plans_of, report, stop_if_asked, warn_of_equal_sources
from fusion.data.inputs import Sources
from fusion.data.row_store import RowStore, SourceArrays
from fusion.data.shared_memory import node_tensor
from fusion.data.source_file import Part
from fusion.data.source_rows import Found, Rows, Window, check_ids
from fusion.distributed.world import World
from fusion.errors import StopRequested

# Blocks are only read if at most so many times the bytes of the sources are fetched. Sorted row groups of any size are
# below it, unless one has the rows of many blocks; groups in any other order are in every block.
MOST_FETCHED = 1.5


@dataclass(frozen=True)
class Placed:
    """A part of a source, and the blocks [first, last) that its rows can be in."""

    part: Part
    first: int
    last: int


class Blocks:
    """The embeddings of N rows, to be read once in blocks. Every rank makes it and iterates over it.

    Args:
        bindings: role to the name of its source.
        placed: role to the parts of its source.
        block_rows: rows per block.
    """

    def __init__(
        self,
        bindings: Mapping[str, str],
        plans: Sequence[Plan],
        placed: Mapping[str, Sequence[Placed]],
        rows: Rows,
        block_rows: int,
        world: World,
    ) -> None:
        self._bindings, self._plans, self._placed, self._rows = bindings, plans, placed, rows
        self._block_rows, self._world = block_rows, world
        self._unknown: dict[str, list[pa.Array]] = {plan.role: [] for plan in plans}
        self._arrays = {plan.role: self._allocated(plan, min(block_rows, len(rows))) for plan in plans}

    def _allocated(self, plan: Plan, block_rows: int) -> SourceArrays:
        """Vectors of a block only, and what is known of all rows."""
        present, zeros, known = (node_tensor((len(self._rows),), torch.bool, self._world) for _ in range(3))
        return SourceArrays(node_tensor((block_rows, plan.kind.dim), plan.dtype, self._world), present, zeros, known)

    def read(self) -> Iterator[tuple[int, RowStore]]:
        """The first row of each block, and the block's rows, which are valid until the next block is read.

        Raises:
            DataError: a source is unreadable or inconsistent, or an id occurs twice.
            StopRequested: one of the ranks was asked to stop.
        """
        for number, first in enumerate(range(0, len(self._rows), self._block_rows)):
            try:
                store = self._read_block(number, Window(self._rows, first, first + self._block_rows))
            except StopRequested as error:
                message = "stopped on request while embeddings were read; what was computed of earlier rows is kept"
                raise StopRequested(message, "run the same command again to resume") from error
            if number == 0:
                self._world.on_main_alone(partial(warn_of_equal_sources, self._bindings, store))
            yield first, store

    def _read_block(self, number: int, window: Window) -> RowStore:
        arrays = {role: _block(one, window) for role, one in self._arrays.items()}
        self._world.together(stop_if_asked)  # from here on, no rank uses the rows of the block before
        self._world.together(lambda: _clear(arrays) if self._world.local_rank == 0 else None)
        plans = [replace(plan, parts=self._parts(plan.role, number)) for plan in self._plans]
        found = fill(plans, window, arrays, {}, self._world)
        read = self._world.gather_on_main(found if self._world.rank == self._world.local_rank else {})
        self._world.on_main_alone(lambda: self._check(plans, [one for one in read if one], window))
        return RowStore.of(arrays)

    def _parts(self, role: str, number: int) -> list[Part]:
        return [one.part for one in self._placed[role] if one.first <= number < one.last]

    def _check(self, plans: Sequence[Plan], read: Sequence[Mapping[str, Found]], window: Window) -> None:
        """Checks that no id of the block occurs twice. Equal ids are in the same block, whatever part they are in."""
        for plan in plans:
            found = Found.joined([one[plan.role] for one in read])
            check_ids(plan.role, plan.source, found, window, max_missing=1.0)
            self._unknown[plan.role].append(found.unknown)

    def report(self, max_missing: float) -> None:
        """Checks and reports all rows, after the last block, as `embeddings.load` does. Only rank 0 calls this.

        Args:
            max_missing: largest share of the rows that a source may lack.

        Raises:
            DataError: a source lacks too many rows.
        """
        n_unknown = {}
        for plan in self._plans:
            known = np.flatnonzero(self._arrays[plan.role].known.numpy()).astype(np.int32)
            unknown = pc.unique(pa.concat_arrays([pa.array([], pa.large_string()), *self._unknown[plan.role]]))
            check_ids(plan.role, plan.source, Found(known, unknown), self._rows, max_missing)
            n_unknown[plan.role] = len(unknown)
        report(self._bindings, self._arrays, n_unknown, pd.Index(self._rows.ids.to_pandas()), max_missing)


def open_blocks(
    data: str, split: str, bindings: Mapping[str, str], files: Sources, ids: pd.Index, block_rows: int, world: World
) -> Blocks | None:
    """Prepares the reading of the rows `ids`, which are sorted, in blocks. Every rank calls this.

    Returns:
        None if the table has only one block, or if the order of the sources would make every block read most of them.
    """
    if len(ids) <= block_rows:
        return None
    world.together(stop_if_asked)
    plans = world.on_main(lambda: plans_of(data, split, bindings, files))
    rows = Rows(ids)
    placed = {plan.role: [_placed(part, rows.ids, block_rows) for part in plan.parts] for plan in plans}
    everything = [one for of_source in placed.values() for one in of_source]
    fetched = sum(_size(one.part) * (one.last - one.first) for one in everything)
    times = fetched / max(1, sum(_size(one.part) for one in everything))
    if times > MOST_FETCHED:
        return None
    log.info(event="reads_blocks", rows=len(ids), block_rows=block_rows, bytes_fetched=fetched, times=times)
    return Blocks(bindings, plans, placed, rows, block_rows, world)


def _placed(part: Part, ids: pa.Array, block_rows: int) -> Placed:
    """The blocks that the part's ids can be in; those of ids that the table does not have are the nearest ones."""
    bounds = _bounds(part)
    if bounds is None:
        return Placed(part, 0, -(-len(ids) // block_rows))
    places = range(len(ids))
    first = bisect_left(places, bounds[0], key=lambda row: ids[row].as_py())
    last = bisect_right(places, bounds[1], key=lambda row: ids[row].as_py())
    first = min(first, len(ids) - 1)
    return Placed(part, first // block_rows, max(first, last - 1) // block_rows + 1)


def _bounds(part: Part) -> tuple[str, str] | None:
    """The first and the last id that the part can have, in the order of texts; None if they are not known."""
    if part.footer is None:
        return None
    group = part.footer.row_group(part.row_group)
    columns = (group.column(number) for number in range(group.num_columns))
    found = next(column.statistics for column in columns if column.path_in_schema == "sample_id")
    if found is None or not found.has_min_max:
        return None
    if isinstance(found.min, int):
        lowest, highest = str(found.min), str(found.max)
        # Integers of one length, without a sign, have the same order as their texts.
        return (lowest, highest) if found.min >= 0 and len(lowest) == len(highest) else None
    return (found.min, found.max) if isinstance(found.min, str) else None


def _size(part: Part) -> int:
    return part.size if part.footer is None else int(part.footer.row_group(part.row_group).total_byte_size)


def _block(arrays: SourceArrays, window: Window) -> SourceArrays:
    """Views of the rows of a window. The vectors are the first ones of an array that all blocks share."""
    rows = slice(window.first, window.first + len(window))
    return SourceArrays(arrays.values[: len(window)], arrays.present[rows], arrays.zeros[rows], arrays.known[rows])


def _clear(arrays: Mapping[str, SourceArrays]) -> None:
    for one in arrays.values():
        one.values.zero_()
