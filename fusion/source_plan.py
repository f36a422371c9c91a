"""Which vector of a source goes to which row: decided on rank 0 from the ids alone, before any vector is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fusion.errors import DataError
from fusion.source_file import Header, SourceFile
from fusion.tables import report_duplicates

N_SHOWN = 3  # ids that a message shows of each side
# Ids that are numbers are written as 7, 7.0, 007 or with spaces around them, depending on who wrote the file.
_NUMBER, _PLAIN = r"^\s*0*(\d+)(?:\.0*)?\s*$", r"\1"


@dataclass(frozen=True)
class Piece:
    """Consecutive row groups of one file, and the row (int32) that each of their vectors goes to (-1: to none)."""

    file: SourceFile
    row_groups: list[int]
    targets: np.ndarray


@dataclass(frozen=True)
class SourcePlan:
    """What is known of a source before its vectors are read."""

    role: str
    dim: int
    dtype: torch.dtype
    pieces: list[Piece]
    n_unknown: int  # ids that the table does not have


@dataclass(frozen=True)
class Rows:
    """The rows that embeddings are wanted for.

    Attributes:
        ids: [N] large_string.
        max_missing: largest share of them that a source may lack.
    """

    ids: pa.Array
    max_missing: float

    @classmethod
    def of(cls, ids: pd.Index, max_missing: float) -> Rows:
        return cls(pa.array(ids, from_pandas=True).cast(pa.large_string()), max_missing)


def plan_source(role: str, source: str, headers: Sequence[Header], rows: Rows, n_pieces: int) -> SourcePlan:
    """Where the vectors of a source go.

    Args:
        source: what messages call it.
        headers: of all its files.
        n_pieces: into which a file is divided at least, where it has so many row groups.

    Raises:
        DataError: no vectors, files that differ, ids that occur twice, or too few that the table has.
    """
    filled = [header for header in headers if header.dim is not None]
    if not filled:
        raise DataError(f"{source} has no vectors in its {len(headers)} files", "write the embeddings again")
    dim, dtype = _common_kind(filled)
    found = pa.chunked_array([chunk for header in filled for chunk in header.ids.chunks], pa.large_string())
    report_duplicates(source, found)
    targets = pc.index_in(found, value_set=rows.ids).fill_null(-1).to_numpy()
    _check_ids(role, source, found, targets, rows)
    bounds = np.cumsum([len(header.ids) for header in filled])[:-1]
    pieces = [
        piece
        for header, part in zip(filled, np.split(targets, bounds), strict=True)
        for piece in _pieces(header, part, n_pieces)
    ]
    stored = torch.float16 if dtype == "float16" else torch.float32
    return SourcePlan(role, dim, stored, pieces, n_unknown=int((targets < 0).sum()))


def _common_kind(headers: Sequence[Header]) -> tuple[int, str]:
    first = headers[0]
    assert first.dim is not None, "only files with vectors are planned"
    for header in headers:
        if (header.dim, header.dtype) != (first.dim, first.dtype):
            raise DataError(
                f"{header.file.url} has vectors of {header.dim} x {header.dtype}, "
                f"{first.file.url} of {first.dim} x {first.dtype}",
                "write all files of a source with the same encoder and type",
            )
    return first.dim, first.dtype


def _check_ids(role: str, source: str, found: pa.ChunkedArray, targets: np.ndarray, rows: Rows) -> None:
    """Raises a DataError that shows ids of both sides when too few of the table's are in the source."""
    n_found = int((targets >= 0).sum())
    if len(rows.ids) - n_found <= rows.max_missing * len(rows.ids):
        return
    is_missing = np.ones(len(rows.ids), bool)
    is_missing[targets[targets >= 0]] = False
    missing, unknown = rows.ids.filter(pa.array(is_missing)), found.filter(pa.array(targets < 0))
    message = f"{source} ({role}) has embeddings for {n_found} of {len(rows.ids)} rows, without: {_shown(missing)}"
    if len(unknown):
        message += f"; it has other ids instead: {_shown(unknown)}"
    n_respelled = _n_equal(_plain(missing), _plain(unknown))
    if n_respelled:
        message += f"; {n_respelled} of them differ only in their spelling"
        raise DataError(message, "write the ids in both files alike, as whole numbers or as the same text")
    if n_found == 0:
        raise DataError(f"{message}; no id is in both", "write the same ids into the table and the source")
    raise DataError(
        message, f"complete the source, or accept more than {rows.max_missing:.0%} missing rows with --max-missing"
    )


def _shown(ids: pa.Array | pa.ChunkedArray) -> str:
    return ", ".join(ids[:N_SHOWN].to_pylist())


def _plain(ids: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The ids as most would write them: without space around, and whole numbers without zeros that say nothing."""
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(ids, _NUMBER, _PLAIN))


def _n_equal(first: pa.Array | pa.ChunkedArray, second: pa.Array | pa.ChunkedArray) -> int:
    """How many of `first` are in `second`."""
    values = second.combine_chunks() if isinstance(second, pa.ChunkedArray) else second
    return int(pc.sum(pc.is_in(first, value_set=values)).as_py() or 0)


def _pieces(header: Header, targets: np.ndarray, n_pieces: int) -> Iterator[Piece]:
    starts = np.concatenate([[0], np.cumsum(header.group_rows)])
    for groups in np.array_split(np.arange(len(header.group_rows)), min(n_pieces, len(header.group_rows))):
        first, last = int(groups[0]), int(groups[-1])
        yield Piece(header.file, groups.tolist(), targets[starts[first] : starts[last + 1]])
