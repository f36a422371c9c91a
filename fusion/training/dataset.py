"""What a training is made of: rows with prices and embeddings, and who of them validates."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusion import log, storage
from fusion.config import RunConfig, digest
from fusion.data.duplicates import compared_columns, near_duplicate_groups
from fusion.data.embeddings import load, stop_if_asked
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
from fusion.records.start import describe_run

# Times the median price. Catalogs from screws to machines stay within it; 99999999 and 1e308 do not.
EXTREME_PRICE = 1e6


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and to validate on.

    Attributes:
        targets: [N] log1p(price), float32.
        train, validation: positions in the store, int64. Rows without any embedding are not trained on.
        prices: [n_validation] dollars, float64.
        ids: [n_validation] sample ids.
        category: [n_validation] text, named after its column; None: there is no such column, or this is not rank 0.
        all_ids: [N] sample ids.
        all_prices: [N] dollars, float64.
        folds: [N] part of the split that each row is in; -1: it is in none.
        groups: [N] group of near-duplicates.
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


def read_data(config: RunConfig, world: World) -> TrainingData:
    """Reads and splits what the run is made of; writes `split.parquet` and `run.json`, or reads the split back."""
    started = time.monotonic()
    table = world.on_main_alone(lambda: _read_table(config))
    ids, prices = world.on_main(lambda: (held(table).ids, held(table).prices))
    store = load(config.data, "train", config.bindings(), ids, world, max_missing=config.max_missing)
    log.info(event="read", rows=len(ids), seconds=time.monotonic() - started)
    columns = world.on_main_alone(lambda: training_columns(config, held(table)))
    split = world.on_main(lambda: _split(config, held(table), held(columns), store, world))
    trains, validates, folds, groups = map(torch.tensor, split)
    features = world.on_main(lambda: _features(config)) if has_features(config) else None
    store = with_features(store, features, columns, "train.csv", world)
    targets = torch.from_numpy(np.log1p(prices).astype(np.float32))
    train = torch.nonzero(trains & store.any_present()).squeeze(1)
    validation = torch.nonzero(validates).squeeze(1)
    rows = validates.numpy()
    store = replace(store, folds=folds, groups=groups)
    category = None if table is None else category_of(table, category_column(config), rows)
    return TrainingData(
        store, targets, train, validation, prices[rows], ids[rows], category, ids, prices, folds, groups
    )


def _read_table(config: RunConfig) -> Table:
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
    """Names rows whose price is a million times the median, or a millionth of it: placeholders, or another unit."""
    distance = np.abs(np.log(table.prices) - np.log(np.median(table.prices)))
    extreme = np.flatnonzero(distance > np.log(EXTREME_PRICE))
    if extreme.size:
        first = ", ".join(f"{table.ids[row]} ({table.prices[row]:g})" for row in extreme[:5])
        log.warning(
            event="extreme_prices", rows=extreme.size, first=first, hint="correct these prices or leave them out"
        )


def _split(
    config: RunConfig, table: Table, columns: Columns, store: RowStore, world: World
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """[N] bool: the row trains; [N] bool: it validates; [N] part of the split that it is in; [N] its group."""
    groups = near_duplicate_groups(table, {role: values.numpy() for role, values in store.values.items()}, config)
    quartiles = np.quantile(table.prices, [0.25, 0.5, 0.75]).tolist()
    rows = [table.digest(), storage.sha256(groups.astype(np.int64).tobytes())]
    rows += [storage.sha256(row_hashes(columns).tobytes())] if columns else []
    run = RunFolder.of(config)
    url = run.at(SPLIT)
    split = None if storage.exists(url) else split_rows(table, groups, config)
    computed = _computed_dims(config, table, columns, split)
    describe_run(config, digest([*rows, store.digest()]), store.dims | computed, quartiles, world.size)
    if split is not None:
        storage.write(url, to_parquet(split))
    made = run.checkpoints()
    split = read_split(run, made[-1].manifest.split_sha256 if made else "")
    if not pd.Index(split["sample_id"]).equals(table.ids):  # describe_run has found the data to be the same
        raise DataError(f"{url} lists other rows than train.csv, or in another order", "train under another --run-id")
    validates, folds = (split["side"] == "validation").to_numpy(bool), part_of(split, config.held_out()[0])
    trains = folds >= 0 if "fold" in split else (split["side"] == "train").to_numpy(bool)
    return trains, validates, folds, split["group"].to_numpy(np.int64)


def _computed_dims(config: RunConfig, table: Table, columns: Columns, split: pd.DataFrame | None) -> dict[str, int]:
    """Role to dimension of the computed sources, which are fitted and written before a run is described.

    Args:
        split: None: the run has one, and so was described.
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
    made = RunFolder.of(config).checkpoints()
    return read_features(RunFolder.of(config), made[-1].manifest.features_sha256 if made else "")


def statistics(data: TrainingData, role: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] over the training rows that have the role."""
    rows = data.train[data.store.present[role][data.train]]
    total = torch.zeros(2, data.store.dims[role], dtype=torch.float64)
    pivot = data.store.values[role][rows[:1024]].double().mean(0) if len(rows) else total[0]  # against cancellation
    for chunk in torch.split(rows, 4096):
        centred = data.store.values[role][chunk].double() - pivot
        total += torch.stack([centred.sum(0), centred.square().sum(0)])
    mean, square = total / max(1, len(rows))
    return (pivot + mean).float(), (square - mean.square()).clamp_min(0).sqrt().float()
