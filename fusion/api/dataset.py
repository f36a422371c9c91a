"""Writes a data frame and arrays to the folder that trainings read, so that commands can use the same data later.

    <data>/train.parquet                          the frame
    <data>/embeddings/train/<source>.parquet      the vectors of each role, under the name of its source

What is there already is never replaced: if it is the same, it is used; if it is not, that is an error.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fusion import log, storage
from fusion.api.frames import NAME, arrow_of, table_from
from fusion.config import RunConfig
from fusion.convert.arrays import Embeddings
from fusion.convert.parquet_file import write
from fusion.data.arrays import Vectors, aligned, row_store
from fusion.data.embeddings import load
from fusion.data.inputs import source_names, sources_folder
from fusion.data.tables import Table, positions_of, read_table
from fusion.distributed.world import alone
from fusion.environment import rank_variables
from fusion.errors import ConfigError, DataError, did_you_mean
from fusion.storage.scratch import temporary_folder

SPLIT = "train"


def write_training_data(config: RunConfig, frame: Any, sources: Mapping[str, Any]) -> None:
    """Writes what `config.data` lacks, and checks that the rest is the same.

    Nothing is written before everything has been checked.

    Args:
        frame, sources: as for `fusion.train`.

    Raises:
        DataError: the frame or an array cannot be used, or the folder holds other data.
        ConfigError: this process is one of several ranks.
    """
    if rank_variables().size > 1:
        hint = "write the data in one process first, then start the ranks with fusion.train(config)"
        raise ConfigError("data in memory cannot be given to several ranks", hint)
    _check_roles(config, sources)
    priced = table_from(frame, priced=True, drop_bad_prices=config.drop_bad_prices)
    table = table_from(frame)  # rows without a price are written, too; readers drop them again
    vectors = {role: aligned(sources[role], role, table, NAME) for role in config.bindings()}
    is_there = _has_table(config, priced)
    lacking = [role for role, one in vectors.items() if not _has_source(config, role, one, table)]
    for role in lacking:
        _write_source(config, role, vectors[role])
    if not is_there:  # the last file, so that a folder with a table is complete
        storage.write(storage.join(config.data, f"{SPLIT}.parquet"), _parquet(arrow_of(frame)))
    log.info(event="data", folder=config.data, rows=len(table), files_written=len(lacking) + (not is_there))


def _check_roles(config: RunConfig, sources: Mapping[str, Any]) -> None:
    """Raises an error unless there is an array for each role of the settings, and no other, and each has a source."""
    roles = list(config.bindings())
    hint = f"give an array for each of {', '.join(roles)}"
    if not isinstance(sources, Mapping):
        raise DataError(f"sources is a {type(sources).__name__}, expected {{role: array}}", hint)
    for role in sources:
        if role not in roles:
            raise DataError(f"{role!r} is not a role of {config.variant}", f"{did_you_mean(str(role), roles)}{hint}")
    names = list(config.bindings().values())
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        hint = f"give each its own, such as sources={{{roles[0]!r}: '{twice[0]}-1'}}"
        raise ConfigError(f"several roles are bound to the source {twice[0]!r}", hint)
    absent = [role for role in roles if sources.get(role) is None]
    if absent:
        raise DataError(f"sources lacks {', '.join(absent)}", f"{hint}, or train a variant with fewer roles")


def _has_table(config: RunConfig, table: Table) -> bool:
    """Whether the folder has this table. Raises a DataError if it has another one."""
    there = {storage.base(entry.url) for entry in storage.entries(config.data)}
    if not there & {f"{SPLIT}.csv", f"{SPLIT}.parquet"}:
        return False
    found = read_table(config.data, SPLIT, priced=True, drop_bad_prices=config.drop_bad_prices)
    difference = _difference(found, table)
    if difference:
        raise _other(config, f"{found.name} of {config.data} differs from {NAME}: {difference}")
    return True


def _difference(found: Table, table: Table) -> str:
    """How two tables differ, in words; empty if they do not."""
    if found.ids_digest() != table.ids_digest():
        n_common = int((positions_of(found.ids, table.ids) >= 0).sum())
        return f"{len(found)} and {len(table)} rows, of which {n_common} have the same sample_id"
    if found.digest() != table.digest():
        return f"{int((found.prices != table.prices).sum())} prices are not the same"
    names = set(found.frame.columns) ^ set(table.frame.columns)
    if names:
        return f"only one of them has the column {min(names)!r}"
    others = [name for name in table.frame if not _is_same(found.frame[name], table.frame[name])]
    return f"the values of the column {others[0]!r}" if others else ""


def _is_same(found: pd.Series, given: pd.Series) -> bool:
    """Whether two columns have the same values. Those of CSV are texts, and compared as numbers if need be."""
    if found.dtype == given.dtype:
        return bool(found.equals(given))
    if pd.api.types.is_numeric_dtype(given) and not pd.api.types.is_bool_dtype(given):
        numbers = pd.to_numeric(found, errors="coerce").to_numpy(np.float64)
        return bool(np.array_equal(numbers, given.to_numpy(np.float64, na_value=np.nan), equal_nan=True))
    return bool(found.astype("str").fillna("").equals(given.astype("str").fillna("")))


def _has_source(config: RunConfig, role: str, vectors: Vectors, table: Table) -> bool:
    """Whether the folder has these vectors. Raises a DataError if it has others under the name of the source."""
    name = config.bindings()[role]
    if name not in source_names(config.data, SPLIT):
        return False
    with log.separate("error"), alone("cpu") as world:  # the training will log the same rows
        found = load(config.data, SPLIT, {role: name}, table.ids, world, partial=True)
    if found.digest != row_store({role: vectors}, {}, 0, len(table)).digest:
        raise _other(config, f"source {name!r} in {sources_folder(config.data, SPLIT)} has other vectors than {role}")
    return True


def _other(config: RunConfig, message: str) -> DataError:
    beside = f"{config.data.rstrip('/')}-2"
    hint = f"write to another folder, such as data={beside!r}, or leave out table and sources to train on what is there"
    return DataError(message, hint)


def _write_source(config: RunConfig, role: str, vectors: Vectors) -> None:
    url = storage.join(sources_folder(config.data, SPLIT), f"{config.bindings()[role]}.parquet")
    dtype = np.dtype(np.float16 if vectors.values.dtype == np.float16 else np.float32)
    embeddings = Embeddings(vectors.ids.cast(pa.string()), vectors.values, vectors.dim, dtype)
    with TemporaryDirectory(prefix="fusion-", dir=temporary_folder()) as scratch:
        write(embeddings, url, Path(scratch))


def _parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    return buffer.getvalue()
