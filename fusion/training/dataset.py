"""The data of a training run: rows with prices and embeddings, split into training and validation rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusion import log, storage
from fusion.config import RunConfig, digest
from fusion.data.duplicates import compared_columns, near_duplicate_groups, vector_hashes
from fusion.data.embeddings import load, stop_if_asked
from fusion.data.node_rows import NodeRows
from fusion.data.row_store import RowStore
from fusion.data.splits import part_of, split_rows
from fusion.data.tables import Table, read_table, warn_of_poor_prices
from fusion.distributed.world import World, held
from fusion.errors import DataError
from fusion.features.fitted import (
    Columns,
    Features,
    fit_features,
    has_features,
    read_columns,
    read_features,
    row_hashes,
    training_columns,
    write_features,
)
from fusion.features.rows import with_features
from fusion.records.intervals import category_column, category_of
from fusion.records.manifests import SPLIT
from fusion.records.run import FACTS, RunFolder
from fusion.records.split import read_split, to_parquet
from fusion.records.start import Read, describe_run
from fusion.training.order import check_nodes

# A price is extreme if it is this many times the median price, or the median divided by it. The prices of a real
# catalog, even one that has both screws and machines, stay within this range; placeholders such as 99999999 and 1e308
# do not. Extreme prices only cause a warning.
EXTREME_PRICE = 1e6
# Rows whose mean is subtracted before squares are summed. Without this, the variance of a column with a large mean and
# a small deviation would be lost to rounding.
PIVOT_ROWS = 1024
CHUNK = 4096  # rows per step of the sums in `statistics`: few enough that their float64 copy is small


@dataclass(frozen=True)
class TrainingData:
    """The N rows of `train.csv`, and which of them are trained on and which are validated on.

    Attributes:
        store: the embeddings of all rows.
        targets: [N] log1p(price), float32.
        train, validation: positions of these rows in the store, int64. Rows without any embedding are in `validation`
            but never in `train`.
        prices: [n_validation] dollars, float64.
        ids: [n_validation] sample ids.
        category: [n_validation] text of the column that intervals are grouped by, with that column's name; None if the
            table has no such column, and on all ranks but 0.
        all_ids: [N] sample ids.
        all_prices: [N] dollars, float64.
        folds: [N] the part of the split that each row is in; -1 if it is in no part.
        groups: [N] the group of near-duplicates that each row belongs to.
        inputs: the rows as batches have them, if not as in `store`: projected, with their candidate neighbours.
    """

    store: RowStore
    targets: Tensor
    train: Tensor
    validation: Tensor
    prices: np.ndarray
    ids: pd.Index
    category: pd.Series | None
    all_ids: pd.Index
    all_prices: np.ndarray
    folds: Tensor
    groups: Tensor
    inputs: RowStore | None = None


def read_data(config: RunConfig, world: World) -> TrainingData:
    """Reads the table and the embeddings of a run, and splits the rows.

    The first attempt at a run writes `split.parquet` and `run.json`; later attempts read the split from there.
    """
    started = time.monotonic()
    table = world.on_main_alone(lambda: _read_table(config))
    ids, prices = world.on_main(lambda: (held(table).ids, held(table).prices))
    missing, cache = config.max_missing, config.cache
    nodes = NodeRows.of(len(ids), world) if config.shard_rows else None
    if nodes is not None:
        log.info(event="rows_divided", nodes=nodes.n_nodes, rows=len(ids), held=len(nodes))
    store = load(config.data, "train", config.bindings(), ids, world, max_missing=missing, cache=cache, nodes=nodes)
    log.info(event="read", rows=len(ids), seconds=time.monotonic() - started)
    columns = world.on_main_alone(lambda: training_columns(config, held(table)))
    vectors = _vectors_or_hashes(store, world)
    data_digest = _store_digest(store, world)
    split = world.on_main(lambda: _split(config, held(table), held(columns), store, vectors, data_digest, world))
    trains, validates, folds, groups = map(torch.tensor, split)
    features = world.on_main(lambda: _features(config)) if has_features(config) else None
    store = with_features(store, features, columns, "train.csv", world)
    targets = torch.from_numpy(np.log1p(prices).astype(np.float32))
    train = torch.nonzero(trains & store.any_present()).squeeze(1)
    validation = torch.nonzero(validates).squeeze(1)
    rows = validates.numpy()
    if nodes is not None:
        check_nodes(config, train, nodes)
    store = replace(store, folds=folds, groups=groups)
    category = None if table is None else category_of(table, category_column(config), rows)
    return TrainingData(
        store, targets, train, validation, prices[rows], ids[rows], category, ids, prices, folds, groups
    )


def _vectors_or_hashes(store: RowStore, world: World) -> dict[str, np.ndarray]:
    """What near-duplicates are found by, on rank 0: role to vectors [N, D], or to hashes [N] of those of all nodes."""
    nodes = store.nodes
    if nodes is None:
        return {role: values.numpy() for role, values in store.values.items()}

    def hashes(values: np.ndarray) -> Callable[[], Tensor]:
        return lambda: torch.from_numpy(vector_hashes(values).view(np.int64))

    joined = {role: nodes.joined(hashes(values.numpy()), world) for role, values in store.values.items()}
    return {role: found.numpy().view(np.uint64) for role, found in joined.items() if found is not None}


def _store_digest(store: RowStore, world: World) -> str:
    """`RowStore.digest` of all rows, on rank 0."""
    if store.nodes is None:
        return store.digest if world.is_main else ""
    return store.nodes_digest(world)


def _read_table(config: RunConfig) -> Table:
    """Reads `train.csv` with the columns that the run needs, and warns of suspicious prices.

    Raises:
        DataError: the table is bad, or lacks the column of --interval-by.
    """
    dates = config.validate_after[:1] if config.validate_after else ()
    kept = list(dict.fromkeys([category_column(config), *dates, *read_columns(config)]))
    drop, hashed = config.drop_bad_prices, [name for name in compared_columns(config) if name not in kept]
    table = read_table(config.data, "train", priced=True, drop_bad_prices=drop, columns=kept, hashed=hashed)
    if config.interval_by is not None:
        table.column(config.interval_by, "--interval-by")
    warn_of_extreme_prices(table)
    warn_of_poor_prices(table)
    return table


def warn_of_extreme_prices(table: Table) -> None:
    """Warns of prices that are over a million times the median, or under a millionth of it.

    Such prices are usually placeholders, or in another unit.
    """
    distance = np.abs(np.log(table.prices) - np.log(np.median(table.prices)))
    extreme = np.flatnonzero(distance > np.log(EXTREME_PRICE))
    if extreme.size:
        first = ", ".join(f"{table.ids[row]} ({table.prices[row]:g})" for row in extreme[:5])
        log.warning(
            event="extreme_prices", rows=extreme.size, first=first, hint="correct these prices or leave them out"
        )


def _split(
    config: RunConfig,
    table: Table,
    columns: Columns,
    store: RowStore,
    vectors: Mapping[str, np.ndarray],
    store_digest: str,
    world: World,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Writes the split and `run.json` of a new run, or reads the split of an existing one; rank 0 alone calls this.

    Args:
        vectors: see `near_duplicate_groups`.
        store_digest: `RowStore.digest` of all rows.

    Returns:
        Four arrays [N]: whether the row is trained on; whether it is validated on; the part of the split that it is in;
        its group of near-duplicates.

    Raises:
        DataError: the data have changed since the run began.
    """
    groups = near_duplicate_groups(table, vectors, config)
    quartiles = np.quantile(table.prices, [0.25, 0.5, 0.75]).tolist()
    rows = [table.digest(), storage.sha256(groups.astype(np.int64).tobytes())]
    rows += [storage.sha256(row_hashes(columns).tobytes())] if columns else []
    run = RunFolder.of(config)
    url = run.at(SPLIT)
    split = None if storage.exists(url) else split_rows(table, groups, config)
    computed = _computed_dims(config, table, columns, split)
    n_nodes = None if store.nodes is None else store.nodes.n_nodes
    read = Read(digest([*rows, store_digest]), store.dims | computed, quartiles, world.size, n_nodes)
    describe_run(config, read)
    if split is not None:
        storage.write(url, to_parquet(split))
    made = run.checkpoints()
    split = read_split(run, made[-1].manifest.split_sha256 if made else "")
    # `describe_run` has already refused changed data, so only a changed split.parquet can cause this.
    if not pd.Index(split["sample_id"]).equals(table.ids):
        raise DataError(f"{url} does not list the rows of train.csv in their order", "train under another --run-id")
    validates, folds = (split["side"] == "validation").to_numpy(bool), part_of(split, config.held_out()[0])
    trains = folds >= 0 if "fold" in split else (split["side"] == "train").to_numpy(bool)
    return trains, validates, folds, split["group"].to_numpy(np.int64)


def _computed_dims(config: RunConfig, table: Table, columns: Columns, split: pd.DataFrame | None) -> dict[str, int]:
    """Returns the dimension of each source that is computed from the table, by role.

    `run.json` contains these dimensions, so a new run fits its computed sources, and writes them, before `run.json`.

    Args:
        split: the split of a new run; None if an earlier attempt has written one, and so has fitted the sources.
    """
    if not has_features(config):
        return {}
    if split is None or storage.exists(RunFolder.of(config).at(FACTS)):
        return _features(config).dims
    trains = (split["side"] == "train").to_numpy(bool) | ("fold" in split)
    features = fit_features(config, columns, table.prices, trains, stop_if_asked)
    write_features(RunFolder.of(config), features)
    return features.dims


def _features(config: RunConfig) -> Features:
    """Reads what an earlier call, or an earlier attempt at the run, has fitted and written."""
    made = RunFolder.of(config).checkpoints()
    return read_features(RunFolder.of(config), made[-1].manifest.features_sha256 if made else "")


def statistics(data: TrainingData, role: str, world: World) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation, both [D], over the training rows that have the role; 0 if no row has it."""
    rows, store, nodes = data.train[data.store.present[role][data.train]], data.store, data.store.nodes
    own = store.own(rows)

    def first_mean() -> Tensor:
        first = own[:PIVOT_ROWS]
        return store.held(role, first).double().mean(0) if len(first) else torch.zeros(store.dims[role]).double()

    pivot = first_mean() if nodes is None else torch.from_numpy(world.on_main(lambda: first_mean().numpy()))

    def sums() -> Tensor:
        total = torch.zeros(2, store.dims[role], dtype=torch.float64)
        room = torch.empty(CHUNK, store.dims[role], dtype=torch.float64)  # new memory for each chunk would take longer
        for chunk in torch.split(own, CHUNK):
            centred = room[: len(chunk)].copy_(store.held(role, chunk)).sub_(pivot)
            total[0] += centred.sum(0)
            total[1] += centred.square_().sum(0)
        return total

    mean, square = (sums() if nodes is None else nodes.summed(sums, world)) / max(1, len(rows))
    return (pivot + mean).float(), (square - mean.square()).clamp_min(0).sqrt().float()
