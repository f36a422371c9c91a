"""Finishes the shards of a source with Polars on one machine. `fusion.prepare.on_ray` does the same on many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from fusion import signals, storage
from fusion.data.source_file import Kind
from fusion.errors import StopRequested
from fusion.prepare.inputs import Input, large_batches, stored_dtype
from fusion.prepare.shards import Findings, Spilled, as_parquet, divided, finished, first_ids
from fusion.records.schemas import FileEntry


@dataclass(frozen=True)
class Work:
    """A source that is to be divided into shards.

    Attributes:
        ids: [N] text, of the table's rows, sorted.
        shard_rows: rows of the table per shard.
    """

    inputs: Sequence[Input]
    kind: Kind
    ids: pl.Series
    shard_rows: int

    @property
    def starts(self) -> pl.Series:
        return first_ids(self.ids, self.shard_rows)

    def ids_of(self, shard: int) -> pl.Series:
        return self.ids.slice(shard * self.shard_rows, self.shard_rows)

    def no_rows(self) -> pl.DataFrame:
        number = pl.Float16 if stored_dtype(self.kind.dtype) == "float16" else pl.Float32
        return pl.DataFrame(schema={"sample_id": pl.String(), "embedding": pl.Array(number, self.kind.dim)})


@dataclass(frozen=True)
class Staged:
    """The finished shards of a source, which are kept apart until all of them are checked.

    Attributes:
        folder: URL of the folder that they are in.
        files: one per shard, in order.
        findings: of all of them.
    """

    folder: str
    files: list[FileEntry]
    findings: Findings


def shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def finish_shard(
    number: int, ids: pl.Series, rows: pl.DataFrame, write: Callable[[str, bytes], object]
) -> tuple[FileEntry, Findings]:
    """Finishes a shard and writes its file. Returns the file's entry for the manifest, and what was found.

    Args:
        ids, rows: as for `finished`.
        write: writes a file, given its name and content.
    """
    kept, findings = finished(ids, rows)
    name, content = shard_name(number), as_parquet(kept)
    write(name, content)
    return FileEntry(name, len(content), storage.sha256(content)), findings


def on_this_machine(work: Work, scratch: Path) -> Staged:
    """Divides the rows among files in `scratch`, one per shard, then finishes these one after the other."""
    spilled, starts = Spilled(scratch / "rows"), work.starts
    for batch in large_batches(work.inputs, work.kind):
        stop_if_asked()
        spilled.add(divided(batch, starts))
    done = []
    for shard in range(len(starts)):
        stop_if_asked()
        rows = spilled.take(shard)
        rows = work.no_rows() if rows is None else rows
        done.append(
            finish_shard(shard, work.ids_of(shard), rows, lambda name, data: (scratch / name).write_bytes(data))
        )
    return Staged(str(scratch), [entry for entry, _ in done], Findings.joined(found for _, found in done))


def stop_if_asked() -> None:
    """Raises StopRequested if this process was asked to stop."""
    if signals.requested():
        message = "stopped on request; sources that were not announced are as they were"
        raise StopRequested(message, "run the same command again")
