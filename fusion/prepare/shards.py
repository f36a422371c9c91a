"""Operations on rows of a source, with Polars: dividing them among shards, and finishing a shard.

A shard has the vectors of `shard_rows` successive rows of the table, which is sorted by id. So an id alone decides
which shard a row belongs to, and each shard is finished by itself. Memory is bounded by one batch and one shard,
however many rows there are.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from fusion.convert.arrays import ROW_GROUP
from fusion.data.source_file import COLUMNS


@dataclass(frozen=True)
class Findings:
    """Ids of rows that need attention.

    Attributes:
        missing: rows of the table without a usable vector.
        unknown: the table does not have them.
        repeated: they occur again, with the same vector.
        contradictory: they occur again, with another vector.
        not_finite: their vector has a value that is NaN or infinite.
        zeros: their vector is all zeros, which training takes for missing.
    """

    missing: pl.Series
    unknown: pl.Series
    repeated: pl.Series
    contradictory: pl.Series
    not_finite: pl.Series
    zeros: pl.Series

    @classmethod
    def joined(cls, parts: Iterable[Findings]) -> Findings:
        parts = list(parts)
        return cls(**{name: pl.concat([getattr(part, name) for part in parts]) for name in FINDINGS})


FINDINGS = tuple(one.name for one in fields(Findings))


def first_ids(ids: pl.Series, shard_rows: int) -> pl.Series:
    """The first id of each shard; the first shard begins with the empty text, so that it takes all smaller ids."""
    starts = ids.gather_every(shard_rows)
    return pl.concat([pl.Series(starts.name, [""]), starts[1:]])


def shards_of(rows: pl.DataFrame, starts: pl.Series) -> pl.Series:
    """[n] int64, the number of the shard of each row.

    Args:
        starts: as `first_ids` returns them.
    """
    return starts.search_sorted(rows["sample_id"], side="right").cast(pl.Int64) - 1


def divided(rows: pl.DataFrame, starts: pl.Series) -> dict[int, pl.DataFrame]:
    """Rows by the number of their shard."""
    numbered = rows.with_columns(shard=shards_of(rows, starts))
    parts = numbered.partition_by("shard", as_dict=True, include_key=False)
    return {int(key[0]): part for key, part in parts.items()}


def finished(ids: pl.Series, rows: pl.DataFrame) -> tuple[pl.DataFrame, Findings]:
    """The usable vectors of a shard, sorted by id, each id once.

    Args:
        ids: of the table's rows of this shard, sorted.
        rows: all rows of the source in this shard, in the order in which they were read.
    """
    wanted = ids.to_frame("sample_id")
    unknown = rows.select("sample_id").join(wanted, on="sample_id", how="anti")["sample_id"]
    found = wanted.join(rows, on="sample_id", how="inner", maintain_order="left_right").rechunk()
    vectors = found["embedding"].to_numpy()
    again, differs = _repetitions(found["sample_id"], vectors)
    finite, zeros = np.isfinite(vectors).all(1), ~vectors.any(1)
    good = ~again & finite & ~zeros
    kept = found if good.all() else found.filter(pl.Series(good))

    def where(mask: np.ndarray) -> pl.Series:
        return found["sample_id"].filter(pl.Series(mask, dtype=pl.Boolean))

    missing = wanted.join(kept.select("sample_id"), on="sample_id", how="anti", maintain_order="left")["sample_id"]
    return kept, Findings(
        missing, unknown, where(again & ~differs), where(differs), where(~again & ~finite), where(~again & zeros)
    )


def _repetitions(ids: pl.Series, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] whether a row has the id of the row before it, and whether it also has another vector. Ids are sorted."""
    again = np.zeros(len(ids), bool)
    again[1:] = (ids[1:] == ids[:-1]).to_numpy()
    differs = np.zeros(len(ids), bool)
    rows = np.flatnonzero(again)
    bits = vectors.view(f"u{vectors.itemsize}")  # so that the order in which equal rows are read makes no difference
    differs[rows] = (bits[rows] != bits[rows - 1]).any(1)
    return again, differs


def as_parquet(rows: pl.DataFrame) -> bytes:
    """A shard in the layout that training reads fastest: plain vectors of fixed length in small row groups."""
    file = io.BytesIO()
    pq.write_table(as_arrow(rows), file, row_group_size=ROW_GROUP, compression="none", use_dictionary=False)
    return file.getvalue()


def as_arrow(rows: pl.DataFrame) -> pa.Table:
    """Ids as large_string, and vectors as lists of fixed size."""
    return rows.select(COLUMNS).to_arrow(compat_level=pl.CompatLevel.oldest())


class Spilled:
    """The rows of a source on disk, in one file per shard; a file is a sequence of Arrow streams, one per batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard}.arrows"

    def add(self, parts: dict[int, pl.DataFrame]) -> None:
        for shard, rows in parts.items():
            # No file stays open, so that there can be more shards than files that a process may open.
            table = as_arrow(rows)
            with self._path(shard).open("ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)

    def take(self, shard: int) -> pl.DataFrame | None:
        """Reads and removes the rows of a shard; None if it has none."""
        path = self._path(shard)
        if not path.exists():
            return None
        batches = list[pa.RecordBatch]()
        with path.open("rb") as file:
            while file.tell() < path.stat().st_size:
                batches += pa.ipc.open_stream(file)
        path.unlink()
        return pl.DataFrame(pl.from_arrow(pa.Table.from_batches(batches)))
