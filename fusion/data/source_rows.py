"""Maps the ids of a source to rows of the table while it is read, and checks all ids on rank 0 afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

from fusion.data.tables import report_duplicates
from fusion.errors import DataError

CHUNK_ROWS = 1 << 16  # ids hashed at a time, to bound the memory of their Python objects
N_SHOWN = 3  # example ids from each side in a message
NO_ROW = -1  # the row of an id that the table does not have
# Matches ids that are integers in any spelling: 7, 7.0, 007, or with spaces around. Tools differ in how they write
# them.
_NUMBER, _PLAIN = r"^\s*0*(\d+)(?:\.0*)?\s*$", r"\1"


@dataclass(frozen=True)
class Found:
    """The rows of the ids of a part of a source, or of a whole source.

    Attributes:
        rows: [N] int32, the row of each id, or NO_ROW if the table does not have the id.
        unknown: large_string, the ids that the table does not have.
    """

    rows: np.ndarray
    unknown: pa.Array

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        rows = np.concatenate([np.empty(0, np.int32), *(part.rows for part in parts)])
        return cls(rows, pa.concat_arrays([pa.array([], pa.large_string()), *(part.unknown for part in parts)]))

    @property
    def known(self) -> np.ndarray:
        """The rows of the ids that the table has."""
        known: np.ndarray = self.rows[self.rows != NO_ROW]
        return known


class Rows:
    """An index from ids to the rows for which embeddings are loaded.

    It is a sorted array of 64-bit hashes, which is searched by bisection; then the ids themselves are compared. It
    needs 16 bytes per row, where a dict would need 150. `pyarrow.compute.index_in` would build its hash table of all
    ids again in each call.

    Attributes:
        ids: [N] large_string, all different.
    """

    def __init__(self, ids: pd.Index) -> None:
        self.ids = pa.array(ids, from_pandas=True).cast(pa.large_string())
        self._key, self._hashes, self._order = _sorted_hashes(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: pa.ChunkedArray) -> Found:
        """The rows of ids [n] large_string."""
        rows = self._with_equal_hash(_hashes(ids, self._key))
        by_row = np.argsort(rows)  # so that the table's ids are read in their order
        same = pc.equal(self.ids.take(pa.array(rows[by_row].clip(min=0))), ids.combine_chunks().take(pa.array(by_row)))
        rows[by_row[~same.to_numpy(zero_copy_only=False)]] = NO_ROW
        return Found(rows, ids.filter(pa.array(rows == NO_ROW)).combine_chunks())

    def _with_equal_hash(self, hashes: np.ndarray) -> np.ndarray:
        """[n] int32, for each hash [n] the row that has it, or NO_ROW.

        The hashes are sorted before they are searched. Then the index is read from its start to its end; searched in
        random order, each step of a bisection of millions of rows would wait for the memory.
        """
        order = np.argsort(hashes)
        hashes = hashes[order]
        position = np.searchsorted(self._hashes, hashes).clip(max=len(self) - 1)
        rows = np.empty(len(hashes), np.int32)
        rows[order] = np.where(self._hashes[position] == hashes, self._order[position], NO_ROW)
        return rows


class Window:
    """The rows [first, last) of a table, for reading only these. Positions are relative to the first of them.

    Attributes:
        ids: [n] large_string.
    """

    def __init__(self, rows: Rows, first: int, last: int) -> None:
        self._rows, self.first = rows, first
        self.ids = rows.ids.slice(first, last - first)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: pa.ChunkedArray) -> Found:
        """As `Rows.find`; ids of other rows of the table have no row, but are not unknown."""
        found = self._rows.find(ids)
        is_inside = (found.rows >= self.first) & (found.rows < self.first + len(self))
        return Found(np.where(is_inside, found.rows - self.first, NO_ROW).astype(np.int32), found.unknown)


def _sorted_hashes(ids: pa.Array) -> tuple[str, np.ndarray, np.ndarray]:
    """A key for which the hashes of all ids differ; these hashes [N] uint64, ascending; the row [N] of each."""
    for key in itertools.count():
        hashes = _hashes(ids, f"{key:016d}")
        order = np.argsort(hashes)
        hashes = hashes[order]
        if (hashes[1:] != hashes[:-1]).all():  # the first key works except for one in 400,000 tables of 10 million ids
            return f"{key:016d}", hashes, order.astype(np.int32)
    raise AssertionError("there is always another key")


def _hashes(ids: pa.Array | pa.ChunkedArray, key: str) -> np.ndarray:
    """[n] uint64 hashes. pandas needs Python objects, so the ids are converted slice by slice."""
    slices = (ids.slice(start, CHUNK_ROWS) for start in range(0, len(ids), CHUNK_ROWS))
    found = [hash_array(part.to_numpy(zero_copy_only=False), hash_key=key, categorize=False) for part in slices]
    return np.concatenate([np.empty(0, np.uint64), *found])


def check_ids(role: str, source: str, found: Found, rows: Rows | Window, max_missing: float) -> None:
    """Checks all ids of a source.

    Args:
        source: its description in messages.
        max_missing: largest share of the table's rows that it may lack.

    Raises:
        DataError: an id occurs twice, or too many of the table's ids are missing. Then the message shows ids of both.
    """
    _check_duplicates(source, found, rows)
    n_found = len(found.known)
    if len(rows) - n_found <= max_missing * len(rows):
        return
    is_missing = np.ones(len(rows), bool)
    is_missing[found.known] = False
    missing = rows.ids.filter(pa.array(is_missing))
    raise too_few(f"{source} ({role})", n_found, missing, found.unknown, max_missing)


def too_few(source: str, n_found: int, missing: pa.Array, unknown: pa.Array, max_missing: float) -> DataError:
    """The error that a source lacks too many of the table's rows.

    Args:
        source: its description.
        n_found: number of the table's rows that it has.
        missing: [n] large_string, ids of the table that the source does not have.
        unknown: large_string, ids of the source that the table does not have.
        max_missing: the share of missing rows that is accepted.
    """
    n_rows = n_found + len(missing)
    message = f"{source} has embeddings for {n_found} of {n_rows} rows, without: {_shown(missing)}"
    if len(unknown):
        message += f"; it has other ids instead: {_shown(unknown)}"
    n_respelled = _n_equal(_plain(missing), _plain(unknown))
    if n_respelled:
        message += f"; {n_respelled} of them differ only in their spelling"
        return DataError(message, "write the ids in both files alike, as whole numbers or as the same text")
    if n_found == 0:
        return DataError(f"{message}; no id is in both", "use the same ids in the table and the source")
    return DataError(
        message, f"complete the source, or accept more than {max_missing:.0%} missing rows with --max-missing"
    )


def _check_duplicates(source: str, found: Found, rows: Rows | Window) -> None:
    is_repeated = np.bincount(found.known, minlength=len(rows)) > 1
    repeated = rows.ids.take(pa.array(found.known[is_repeated[found.known]]))
    report_duplicates(source, pa.chunked_array([repeated, found.unknown]))


def _shown(ids: pa.Array) -> str:
    return ", ".join(ids[:N_SHOWN].to_pylist())


def _plain(ids: pa.Array) -> pa.Array:
    """The ids without spaces around them, and integers without leading zeros or a decimal point."""
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(ids, _NUMBER, _PLAIN))


def _n_equal(first: pa.Array, second: pa.Array) -> int:
    """How many of `first` are in `second`."""
    return int(pc.sum(pc.is_in(first, value_set=second)).as_py() or 0)
