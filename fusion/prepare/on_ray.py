"""Finishes the shards of a source on a Ray cluster, for sources that one machine cannot hold.

Ray Data reads the files, shuffles rows by shard, and runs `finish_shard` for each; `fusion.prepare.work` does the same
with files on one machine. Workers write shards into a folder beside the final ones, from which they are published after
all have been checked. All workers must be able to read the inputs and to write the output.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pyarrow as pa

from fusion import __version__, storage
from fusion.data.source_file import Kind
from fusion.errors import ConfigError, CredentialsError, DataError, FusionError, UnreachableError
from fusion.prepare.access import Access
from fusion.prepare.inputs import Input, absolute_url, entries_of, large_batches
from fusion.prepare.shards import FINDINGS, Findings, as_arrow, shards_of
from fusion.prepare.work import Staged, Work, finish_shard, stop_if_asked
from fusion.records.schemas import FileEntry
from fusion.storage import Entry
from fusion.storage.scratch import temporary_folder

_OTHER_CODE = re.compile(r"No module named '[\w.]+'|Can't get attribute '\w+' on <module '[\w.]+'")
CONNECT_TIMEOUT = 10.0  # seconds; Ray itself would try for more than two minutes, and end the process
Result = tuple[FileEntry, Findings]
_SAME = "install the same version of fusion[ray] on all nodes, or use one image for all"
_SUBMIT = "ray job submit --address http://HEAD:8265 -- python -m fusion.prepare"


@contextmanager
def cluster(address: str | None = None) -> Iterator[None]:
    """Connects to a Ray cluster, or starts one on this machine if Ray finds none.

    Args:
        address: as for `ray.init`, such as `auto` or `10.0.0.1:6379`; None: the one of RAY_ADDRESS or of `ray start`.

    Raises:
        ConfigError: the address is not one of a cluster, or its versions of Ray or Python differ from those here.
        UnreachableError, CredentialsError: the cluster does not answer, or asks for a token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray sends reports to its makers
    import ray

    with _connection_explained(address or os.environ.get("RAY_ADDRESS", "")):
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it would print the traceback of every error of a worker
    try:
        with _own_errors_raised():
            _check_nodes()
        yield
    finally:
        ray.shutdown()


@contextmanager
def _connection_explained(address: str) -> Iterator[None]:
    if "://" in address:
        message = f"{address} is not an address of a Ray cluster that fusion.prepare can join"
        raise ConfigError(message, f"run it on the cluster with `{_SUBMIT} …`, or give --ray-address HOST:6379")
    _connect(address)
    try:
        yield
    except ConnectionError as error:
        message = f"the Ray cluster {address or 'on this machine'} does not accept this process: {error}"
        raise CredentialsError(
            message, "set RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN, or correct --ray-address"
        ) from error
    except (RuntimeError, ValueError) as error:  # other versions of Ray or Python, or an address of another form
        message = f"cannot join the Ray cluster {address}: {error}"
        raise ConfigError(
            message, f"use the Ray and the Python of the cluster, for example with `{_SUBMIT} …`"
        ) from error


def _connect(address: str) -> None:
    """Raises an UnreachableError if nothing listens at an address of the form HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
    except OSError as error:
        message = f"no Ray cluster answers at {address}: {error}"
        raise UnreachableError(message, "correct --ray-address or RAY_ADDRESS, or leave it out") from error


def _check_nodes() -> None:
    """Raises a ConfigError if a node that runs tasks lacks this package or has another version of it.

    Without this check, Ray would start workers that cannot work again and again.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    every = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in every if node["Alive"] and node["Resources"].get("CPU")]
    task = ray.remote(num_cpus=0, max_retries=0)(_version)
    on = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    found = ray.get([task.options(scheduling_strategy=where).remote() for where in on])
    for node, version in zip(nodes, found, strict=True):
        if version != __version__:
            message = f"{node['NodeManagerAddress']} has fusion {version}, this machine has {__version__}"
            raise ConfigError(message, _SAME)


def _version() -> str:
    return __version__


def on_ray(work: Work, staging: str) -> Staged:
    """As `on_this_machine`, with shards written to the folder `staging`. Call it inside of `cluster`."""
    found: dict[int, Result] = {}
    staging = absolute_url(staging)
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

    inputs, starts = [one.absolute() for one in work.inputs], work.starts.to_arrow()
    kind, shard_rows, access = work.kind, work.shard_rows, Access.of_this_process()
    ids = ray.put(work.ids.to_arrow())  # workers of a machine share one copy

    def read(batch: Any) -> Iterator[Any]:
        access.use()
        yield from _read([inputs[i] for i in batch["id"]], kind, pl.Series(pl.from_arrow(starts)))

    def finish(rows: pa.Table) -> pa.Table:
        access.use()
        shard = rows["shard"][0].as_py()
        mine = pl.Series(pl.from_arrow(ray.get(ids).slice(shard * shard_rows, shard_rows)))
        return _row(shard, _finish(shard, mine, _as_polars(rows), staging))

    numbers = ray.data.range(len(inputs), override_num_blocks=len(inputs))
    rows = numbers.map_batches(read, batch_size=1, batch_format="numpy")
    return rows.groupby("shard", num_partitions=len(starts)).map_groups(finish, batch_format="pyarrow")


def _read(inputs: Sequence[Input], kind: Kind, starts: pl.Series) -> Iterator[pa.Table]:
    """Batches of rows, each with the number of its shard."""
    _check_shared(entries_of(inputs))
    with TemporaryDirectory(prefix="fusion-prepare-", dir=temporary_folder()) as scratch:
        for batch in large_batches([one.on_worker(Path(scratch)) for one in inputs], kind):
            yield as_arrow(batch).append_column("shard", shards_of(batch, starts).to_arrow())


def _check_shared(files: Sequence[Entry]) -> None:
    for file in files:
        if "://" not in file.url and not os.path.exists(file.url):
            message = f"{file.url} does not exist on {socket.gethostname()}, a node of the Ray cluster"
            raise DataError(message, "name a bucket with --source, or a folder that all nodes share")


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
    if found := _OTHER_CODE.search(str(error)):
        return ConfigError(f"a node of the Ray cluster cannot run this version of fusion: {found[0]}", _SAME)
    inner: BaseException | None = error
    while isinstance(inner, wrapper):
        inner = getattr(inner, "cause", None) or inner.__cause__
    return inner if isinstance(inner, FusionError) else error
