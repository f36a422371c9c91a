"""Prepares sources one after the other: divides rows among shards, finishes and checks these, then publishes them."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import pyarrow as pa

from fusion import storage
from fusion.data.inputs import find_table
from fusion.data.source_file import Kind
from fusion.data.tables import read_files
from fusion.errors import ConfigError, DataError, UnreachableError
from fusion.prepare.checks import check
from fusion.prepare.folder import MadeFrom, SourceFolder
from fusion.prepare.inputs import Input, entries_of, first_kind, inputs_of, stored_dtype
from fusion.prepare.requests import Request, files
from fusion.prepare.scratch import scratch_folder
from fusion.prepare.work import Staged, Work, on_this_machine
from fusion.records.schemas import SCHEMA, InputFile, SourceManifest
from fusion.storage import Entry

_OTHER = {"csv": "parquet", "parquet": "csv"}  # the other ending that a table may have


@dataclass(frozen=True)
class Options:
    """What to prepare, and where.

    Attributes:
        requests: name of a source to its `--source` flags.
        table: URL of the table; None: the one that `to` has.
        to: folder or bucket that training reads, `<data>`.
        max_missing: largest share of the table's rows that a source may lack.
        drop_bad_vectors: whether rows with values that are not finite count as missing, instead of being an error.
        shard_rows: rows of the table per file.
        engine: "polars", which works on this machine, or "ray", which needs `on_ray.cluster`.
    """

    requests: dict[str, list[Request]]
    table: str | None
    split: str
    to: str
    max_missing: float
    drop_bad_vectors: bool
    shard_rows: int
    engine: str


@dataclass(frozen=True)
class Rows:
    """The table's rows.

    Attributes:
        ids: [N] sorted as training sorts them.
        sha256: of the ids.
    """

    ids: pl.Series
    sha256: str


def prepare(options: Options) -> Iterator[str]:
    """Prepares all sources, then writes the table. Yields a line about each as soon as it is done.

    Raises:
        DataError: a file is missing or damaged, or the ids or vectors are not as they must be.
        UnreachableError: a file was written while it was read, or a store does not answer.
        UsageError, ConfigError, CredentialsError: as the message says.
        StopRequested: the process received a stop signal.
    """
    table_files = _table_files(options)
    url = table_files[0].url if len(table_files) == 1 else storage.join(options.to, f"{options.split}.parquet")
    table = read_files(table_files, url, priced=False, columns=())
    rows = Rows(pl.Series(pl.from_arrow(pa.array(table.ids, pa.large_string()))), table.ids_digest())
    del table
    for name, requests in options.requests.items():
        with scratch_folder() as scratch, _full_disk_named(scratch):
            inputs = inputs_of(requests, scratch)
            yield _prepared(options, name, inputs, rows, scratch)
    if options.table:
        yield _copy_table(options, table_files[0])


def _table_files(options: Options) -> tuple[Entry, ...]:
    if not options.table:
        return find_table(options.to, options.split)
    found = files(options.table)
    if len(found) > 1:
        message = f"{options.table} names {len(found)} files, expected one"
        hint = f"write them to {options.split}.parquet/ in the folder of --to, and leave out --table"
        raise DataError(message, hint)
    _table_url(options, found[0])
    return tuple(found)


@contextmanager
def _full_disk_named(scratch: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        remedy = "set TMPDIR to a folder with room for the vectors of one source"
        raise ConfigError(f"{scratch.parent} is full: {error.strerror}", remedy) from error


def _prepared(options: Options, name: str, inputs: Sequence[Input], rows: Rows, scratch: Path) -> str:
    """Prepares a source, unless it is already prepared, and returns a line about it."""
    folder = SourceFolder.of(options.to, options.split, name)
    folder.check_replaceable(entries_of(inputs))
    made_from = MadeFrom(rows.sha256, options.shard_rows, _identity(inputs))
    if found := _usable(options, folder, made_from):
        return f"{_summary(folder, found)}: unchanged"
    work = Work(inputs, first_kind(name, inputs), rows.ids, options.shard_rows)
    with _staged(options, folder, work, scratch) as staged:
        check(name, staged.findings, len(rows.ids), options.max_missing, options.drop_bad_vectors)
        if entries_of(inputs_of(options.requests[name], scratch)) != entries_of(inputs):
            message = f"files of {name} changed while they were read"
            raise UnreachableError(message, "run it again once they are complete")
        if found := _usable(options, folder, made_from):
            return f"{_summary(folder, found)}: written by another command"
        manifest = _manifest(folder, work.kind, made_from, len(rows.ids), len(staged.findings.missing))
        return _summary(folder, folder.publish(staged.folder, replace(manifest, files=staged.files)))


def _usable(options: Options, folder: SourceFolder, made_from: MadeFrom) -> SourceManifest | None:
    """The manifest in the folder, if nothing needs to be done."""
    found = folder.current(made_from)
    return found if found and found.vectors >= (1 - options.max_missing) * found.table_rows else None


@contextmanager
def _staged(options: Options, folder: SourceFolder, work: Work, scratch: Path) -> Iterator[Staged]:
    """The finished shards, not yet checked."""
    if options.engine == "polars":
        yield on_this_machine(work, scratch)
        return
    from fusion.prepare.on_ray import on_ray

    staging = folder.new_staging()
    try:
        staged = on_ray(work, staging)
        folder.check_staged(staged.folder, staged.files)
        yield staged
    finally:
        storage.remove(staging)


def _identity(inputs: Sequence[Input]) -> tuple[InputFile, ...]:
    return tuple(InputFile(entry.url, entry.size, entry.version) for entry in entries_of(inputs))


def _manifest(folder: SourceFolder, kind: Kind, made_from: MadeFrom, n_rows: int, n_missing: int) -> SourceManifest:
    """The manifest, without its files, which are not written yet."""
    return SourceManifest(
        SCHEMA,
        [],
        source=folder.name,
        split=folder.split,
        dim=kind.dim,
        dtype=stored_dtype(kind.dtype),
        shard_rows=made_from.shard_rows,
        table_rows=n_rows,
        table_sha256=made_from.table_sha256,
        vectors=n_rows - n_missing,
        inputs=made_from.inputs,
    )


def _summary(folder: SourceFolder, manifest: SourceManifest) -> str:
    shape = f"{manifest.vectors} vectors of {manifest.dim} {manifest.dtype}"
    missing = manifest.table_rows - manifest.vectors
    return f"{folder.url}: {shape} in {len(manifest.files)} files, {missing} rows without one"


def _copy_table(options: Options, table: Entry) -> str:
    """Copies the table to where training reads it, unless it is there already."""
    url = _table_url(options, table)
    content = storage.read(table.url)
    if storage.read_if_exists(url) == content:
        return f"{url}: unchanged"
    storage.write(url, content)
    return f"{url}: copied from {table.url}"


def _table_url(options: Options, table: Entry) -> str:
    """Where training reads the table. Raises a DataError if there is another one, which it would read instead."""
    ending = "parquet" if table.url.endswith(".parquet") else "csv"
    url, other = (storage.join(options.to, f"{options.split}.{one}") for one in (ending, _OTHER[ending]))
    if storage.exists(other):
        raise DataError(f"{other} exists beside {url}", "remove the wrong one, or name another folder with --to")
    return url
