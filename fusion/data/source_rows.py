"""Which rows the ids of a source stand for: looked up while it is read, and judged on rank 0 once all of it is read."""

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

CHUNK_ROWS = 1 << 16  # ids hashed at a time
N_SHOWN = 3  # ids that a message shows of each side
NO_ROW = -1  # stands for the row of an id that the table does not have
# Ids that are numbers are written as 7, 7.0, 007 or with spaces around them, depending on who wrote the file.
_NUMBER, _PLAIN = r"^\s*0*(\d+)(?:\.0*)?\s*$", r"\1"


@dataclass(frozen=True)
class Found:
    """The ids of a part of a source, or of all of it.

    Attributes:
        rows: [N] int32, the row of each id, NO_ROW where the table lacks it.
        unknown: large_string, the ids that the table lacks.
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
    """The rows that embeddings are wanted for, by their ids.

    Ids are found by a hash of 64 bits and a binary search, and then compared: 16 bytes per row, where a dict would take
    150, and no time for ids that are not asked for, where `pyarrow.compute.index_in` would hash all of them each time.

    Attributes:
        ids: [N] large_string, all different.
    """

    def __init__(self, ids: pd.Index) -> None:
        self.ids = pa.array(ids, from_pandas=True).cast(pa.large_string())
        self._key, hashes = _distinct_hashes(self.ids)
        self._order = np.argsort(hashes).astype(np.int32)
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: pa.ChunkedArray) -> Found:
        """The rows of ids [n] large_string."""
        hashes = _hashes(ids, self._key)
        place = np.searchsorted(self._hashes, hashes).clip(max=len(self) - 1)
        rows = np.where(self._hashes[place] == hashes, self._order[place], NO_ROW).astype(np.int32)
        same = pc.equal(self.ids.take(pa.array(rows.clip(min=0))), ids.combine_chunks())
        rows[~same.to_numpy(zero_copy_only=False)] = NO_ROW
        return Found(rows, ids.filter(pa.array(rows == NO_ROW)).combine_chunks())


def _distinct_hashes(ids: pa.Array) -> tuple[str, np.ndarray]:
    """A key for the hash with which no two of the ids collide, and their hashes [N] uint64."""
    for key in itertools.count():
        hashes = _hashes(ids, f"{key:016d}")
        if len(np.unique(hashes)) == len(ids):  # at 10 million ids all but once in 400,000 times
            return f"{key:016d}", hashes
    raise AssertionError("there is always another key")


def _hashes(ids: pa.Array | pa.ChunkedArray, key: str) -> np.ndarray:
    """[n] uint64; the texts become Python objects, but only a slice of them at a time."""
    slices = (ids.slice(start, CHUNK_ROWS) for start in range(0, len(ids), CHUNK_ROWS))
    found = [hash_array(part.to_numpy(zero_copy_only=False), hash_key=key, categorize=False) for part in slices]
    return np.concatenate([np.empty(0, np.uint64), *found])


def check_ids(role: str, source: str, found: Found, rows: Rows, max_missing: float) -> None:
    """Judges all ids of a source.

    Args:
        source: what messages call it.
        max_missing: largest share of the rows that it may lack.

    Raises:
        DataError: ids that occur twice, or too few that the table has; the message shows ids of both sides.
    """
    _check_duplicates(source, found, rows)
    n_found = len(found.known)
    if len(rows) - n_found <= max_missing * len(rows):
        return
    is_missing = np.ones(len(rows), bool)
    is_missing[found.known] = False
    missing, unknown = rows.ids.filter(pa.array(is_missing)), found.unknown
    message = f"{source} ({role}) has embeddings for {n_found} of {len(rows)} rows, without: {_shown(missing)}"
    if len(unknown):
        message += f"; it has other ids instead: {_shown(unknown)}"
    n_respelled = _n_equal(_plain(missing), _plain(unknown))
    if n_respelled:
        message += f"; {n_respelled} of them differ only in their spelling"
        raise DataError(message, "write the ids in both files alike, as whole numbers or as the same text")
    if n_found == 0:
        raise DataError(f"{message}; no id is in both", "write the same ids into the table and the source")
    raise DataError(
        message, f"complete the source, or accept more than {max_missing:.0%} missing rows with --max-missing"
    )


def _check_duplicates(source: str, found: Found, rows: Rows) -> None:
    is_repeated = np.bincount(found.known, minlength=len(rows)) > 1
    repeated = rows.ids.take(pa.array(found.known[is_repeated[found.known]]))
    report_duplicates(source, pa.chunked_array([repeated, found.unknown]))


def _shown(ids: pa.Array) -> str:
    return ", ".join(ids[:N_SHOWN].to_pylist())


def _plain(ids: pa.Array) -> pa.Array:
    """The ids as most would write them: without space around, and whole numbers without zeros that say nothing."""
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(ids, _NUMBER, _PLAIN))


def _n_equal(first: pa.Array, second: pa.Array) -> int:
    """How many of `first` are in `second`."""
    return int(pc.sum(pc.is_in(first, value_set=second)).as_py() or 0)
