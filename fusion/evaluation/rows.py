"""Reads the rows again that a run validated on, as its training had them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from fusion import log
from fusion.config import AblateConfig, EvaluateConfig, RunConfig
from fusion.data.embeddings import load
from fusion.data.row_store import RowStore
from fusion.data.splits import part_of
from fusion.data.tables import Table, positions_of, read_table
from fusion.distributed.world import World, held
from fusion.errors import DataError
from fusion.evaluation import tables
from fusion.features.fitted import columns_of
from fusion.features.rows import with_features
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import (
    check_dims,
    features_of,
    validation_digest,
)
from fusion.records import manifests
from fusion.records.run import RunFolder
from fusion.records.split import read_split

# Columns of each row that the evaluation computes. Columns of `train.csv` with these names are not shown beside them.
COMPUTED = ("price", "predicted", "present", "smape")


def read_validation(
    settings: EvaluateConfig | AblateConfig,
    run: RunFolder,
    config: RunConfig,
    chosen: manifests.Checkpoint,
    model: PriceModel,
    data: str,
    world: World,
    by: Sequence[str] = (),
    others: Sequence[str] = (),
) -> tuple[Table | None, RowStore, bool | None]:
    """Reads a run's validation rows again, as its training had them.

    Args:
        by, others: columns of `train.csv` to read: those to group by, which must exist, and further ones.

    Returns:
        The table, on rank 0 only; the embeddings; and whether both are as they were in the training, None if the run
        does not say.

    Raises:
        DataError: rows or columns are missing, or the rows are others and --other-data was not given.
    """
    features = world.on_main(lambda: features_of(run, config, chosen))
    names = [*others, *(features.names if features else [])]
    table = world.on_main_alone(lambda: validation_rows(run, chosen, config, by, data, names))
    columns = world.on_main_alone(lambda: columns_of(features, held(table)))
    ids = world.on_main(lambda: held(table).ids)
    store = load(data, "train", config.bindings(), ids, world, partial=True, cache=settings.cache)
    store = with_features(store, features, columns, "train.csv", world)
    check_dims(store.dims, model.dims, f"{data}/embeddings/train")
    store = as_validated(store, model, run, config, chosen, world)
    return table, store, world.on_main(lambda: is_as_trained(settings.other_data, chosen, store, held(table), data))


def as_validated(
    store: RowStore, model: PriceModel, run: RunFolder, config: RunConfig, chosen: manifests.Checkpoint, world: World
) -> RowStore:
    """Prepares the validation rows and the model such that each row is predicted as in the training.

    Returns the rows with their part of the split, so that each is predicted only by the members that held it out, and
    with their groups, so that no row has a near-duplicate as a neighbour. Removes the rows that all members held out
    from the memory of the model.
    """
    folds, groups = world.on_main(lambda: _parts_and_groups(run, config, chosen))
    if model.memory is not None:
        model.memory = model.memory.without(config.held_out())
    return replace(store, folds=torch.from_numpy(folds), groups=torch.from_numpy(groups))


def _parts_and_groups(run: RunFolder, config: RunConfig, chosen: manifests.Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each validation row, [n] the part of the split that it is in, and [n] its group."""
    split = read_split(run, chosen.manifest.split_sha256)
    validates = (split["side"] == "validation").to_numpy(bool)
    return part_of(split, config.held_out()[0])[validates], split["group"].to_numpy(np.int64)[validates]


def is_as_trained(
    other_data: bool, chosen: manifests.Checkpoint, store: RowStore, table: Table, data: str
) -> bool | None:
    """Whether prices and embeddings of the validation rows are those of the training; None if that is not known.

    Args:
        other_data: whether to accept rows that differ; a warning then says so.

    Raises:
        DataError: they differ, and `other_data` is False. If ids have changed, these may be rows that were trained on,
            whose metrics would be too good.
    """
    if not chosen.manifest.validation_sha256:
        log.warning(
            event="data_not_compared", reason="an earlier version trained this run, and did not record a digest of them"
        )
        return None
    found = validation_digest(store.digest_of(torch.arange(len(store))), table.prices)
    if found == chosen.manifest.validation_sha256:
        return True
    if other_data:
        log.warning(event="other_data", reason="prices or embeddings are not those of the training")
        return False
    raise DataError(
        f"the validation rows in {data} have other prices or embeddings than in training: sha256 {found[:12]}, was "
        f"{chosen.manifest.validation_sha256[:12]}",
        "name the data that the run was trained on with --data; if these rows were never trained on, use --other-data",
    )


def validation_rows(
    run: RunFolder,
    chosen: manifests.Checkpoint,
    config: RunConfig,
    by: Sequence[str],
    data: str,
    others: Sequence[str] = (),
) -> Table:
    """Reads the rows of `train.csv` that the run validated on, sorted by sample_id.

    Args:
        by: columns to group the rows by; they have to exist.
        others: further columns to read, if they exist.

    Raises:
        DataError: a row or a column of `by` is missing.
    """
    split = read_split(run, chosen.manifest.split_sha256)
    ids = pd.Index(split.loc[split["side"] == "validation", "sample_id"])
    drop = config.drop_bad_prices
    table = read_table(
        data,
        "train",
        priced=True,
        drop_bad_prices=drop,
        columns=lambda names: [*columns_of_report(by, names), *others],
    )
    for column in by:
        table.column(column, "--by")
    positions = positions_of(ids, table.ids)
    missing = ids[positions < 0]
    if len(missing):
        raise DataError(
            f"{len(missing)} validation rows of the run are not in {data}/train.csv, the first: "
            f"{', '.join(missing[:5])}",
            "name the data that the run was trained on with --data",
        )
    return Table(table.frame.iloc[positions], np.arange(len(ids)), table.columns)


def columns_of_report(by: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the columns that a report needs: those to group by, and the first others, to show with extreme rows."""
    others = [name for name in names if name and name not in ("sample_id", *COMPUTED)]
    return [*by, *others[: tables.N_TEXTS]]
