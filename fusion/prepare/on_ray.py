"""Finishes the shards of a source on a Ray cluster, for sources that one machine cannot hold.

Ray Data reads the files, shuffles rows by shard, and runs `finish_shard` for each; `fusion.prepare.work` does the same
with files on one machine. Workers write shards into a folder beside the final ones, from which they are published after
all have been checked. All workers must be able to read the inputs and to write the output.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pyarrow as pa

from fusion import storage
from fusion.data.source_file import Kind
from fusion.errors import FusionError
from fusion.prepare.inputs import Input, large_batches
from fusion.prepare.shards import FINDINGS, Findings, as_arrow, shards_of
from fusion.prepare.work import Staged, Work, finish_shard, stop_if_asked
from fusion.records.schemas import FileEntry
from fusion.storage.scratch import temporary_folder

Result = tuple[FileEntry, Findings]


@contextmanager
def cluster() -> Iterator[None]:
    """Connects to the cluster of RAY_ADDRESS, or else starts one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray sends reports to its makers
    import ray

    alone: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **alone)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def on_ray(work: Work, staging: str) -> Staged:
    """As `on_this_machine`, with shards written to the folder `staging`. Call it inside of `cluster`."""
    found: dict[int, Result] = {}
    with _own_errors_raised():
        for row in _results(work, staging).iter_rows():
            stop_if_asked()
            found[row["shard"]] = _result(row)
    for shard in range(len(work.starts)):
        if shard not in found:  # no file has a row of it
            found[shard] = _finish(shard, work.ids_of(shard), work.no_rows(), staging)
    done = [found[shard] for shard in sorted(found)]
    return Staged(staging, [entry for entry, _ in done], Findings.joined(findings for _, findings in done))


def _results(work: Work, staging: str) -> Any:
    """A dataset of one row per shard that has rows, see `_row`."""
    import ray

    inputs, starts, kind, shard_rows = work.inputs, work.starts.to_arrow(), work.kind, work.shard_rows
    ids = ray.put(work.ids.to_arrow())  # workers of a machine share one copy

    def read(batch: Any) -> Iterator[Any]:
        yield from _read([inputs[i] for i in batch["id"]], kind, pl.Series(pl.from_arrow(starts)))

    def finish(rows: pa.Table) -> pa.Table:
        shard = rows["shard"][0].as_py()
        mine = pl.Series(pl.from_arrow(ray.get(ids).slice(shard * shard_rows, shard_rows)))
        return _row(shard, _finish(shard, mine, _as_polars(rows), staging))

    numbers = ray.data.range(len(inputs), override_num_blocks=len(inputs))
    rows = numbers.map_batches(read, batch_size=1, batch_format="numpy")
    return rows.groupby("shard", num_partitions=len(starts)).map_groups(finish, batch_format="pyarrow")


def _read(inputs: Iterable[Input], kind: Kind, starts: pl.Series) -> Iterator[pa.Table]:
    """Batches of rows, each with the number of its shard."""
    with TemporaryDirectory(prefix="fusion-prepare-", dir=temporary_folder()) as scratch:
        for batch in large_batches([one.on_worker(Path(scratch)) for one in inputs], kind):
            yield as_arrow(batch).append_column("shard", shards_of(batch, starts).to_arrow())


def _as_polars(rows: pa.Table) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(rows.select(["sample_id", "embedding"])))


def _finish(shard: int, ids: pl.Series, rows: pl.DataFrame, staging: str) -> Result:
    return finish_shard(shard, ids, rows, lambda name, content: storage.write(storage.join(staging, name), content))


def _row(shard: int, result: Result) -> pa.Table:
    """A table of one row: the number of a shard, its file, and a list of ids for each finding."""
    entry, findings = result
    ids = {name: pa.array([getattr(findings, name).to_list()], pa.large_list(pa.large_string())) for name in FINDINGS}
    return pa.table({"shard": [shard], "key": [entry.key], "bytes": [entry.bytes], "sha256": [entry.sha256]} | ids)


def _result(row: dict[str, Any]) -> Result:
    findings = {name: pl.Series("sample_id", list(row[name]), pl.String) for name in FINDINGS}
    return FileEntry(row["key"], row["bytes"], row["sha256"]), Findings(**findings)


@contextmanager
def _own_errors_raised() -> Iterator[None]:
    """Raises the FusionError of a worker instead of Ray's error that wraps it."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise _own(error, ray.exceptions.RayError) from None


def _own(error: BaseException, wrapper: type[BaseException]) -> BaseException:
    """The FusionError that Ray's errors were raised for; the first of these if there is none."""
    inner: BaseException | None = error
    while isinstance(inner, wrapper):
        inner = getattr(inner, "cause", None) or inner.__cause__
    return inner if isinstance(inner, FusionError) else error
