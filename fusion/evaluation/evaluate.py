"""How good a run is, group by group, on its own validation rows only."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusion import log, storage
from fusion.config import EvaluateConfig, RunConfig
from fusion.data.embeddings import load
from fusion.data.row_store import RowStore
from fusion.data.splits import part_of
from fusion.data.tables import Table, positions_of, read_table
from fusion.distributed.world import World, held, join_world
from fusion.errors import DataError
from fusion.evaluation import report
from fusion.evaluation.groups import Evaluation, evaluate
from fusion.features.fitted import columns_of
from fusion.features.rows import with_features
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import (
    BuildNetwork,
    C,
    check_dims,
    features_of,
    load_model,
    named,
    open_run,
    parts_folder,
    pricing,
    validation_digest,
)
from fusion.prediction.resumable import Arrays, compute_parts, discard
from fusion.records import intervals, manifests
from fusion.records.contention import turns
from fusion.records.run import RunFolder
from fusion.records.schemas import SCHEMA, Intervals, MetricsManifest, seal
from fusion.records.split import read_split
from fusion.records.validation import computed_frame
from fusion.submissions import submission
from fusion.submissions.predictions import COMPARABLES

COMPUTED = ("price", "predicted", "present", "smape")  # of each row; the user's columns of these names are not shown


def evaluate_by_groups(settings: EvaluateConfig, config_class: type[C], build_network: BuildNetwork[C]) -> None:
    """Predicts a run's validation rows with its best checkpoint, writes metrics by group and prints them.

    Raises:
        DataError: no such run, a --by column that does not exist, rows of the split that are no longer there, prices or
            embeddings that are not those of the training.
        StopRequested: a signal came; the parts that are done are kept.
    """
    with join_world(settings.device) as world:
        run, config, chosen, data = open_run(settings, config_class, world)
        model = load_model(chosen, config, build_network, world)
        origin = world.on_main(lambda: submission.origin_of(run, chosen, config, data, "train"))
        features = world.on_main(lambda: features_of(run, config, chosen))
        names = [intervals.category_column(config), *(features.names if features else [])]
        table = world.on_main_alone(lambda: validation_rows(run, chosen, config, settings.by, data, names))
        columns = world.on_main_alone(lambda: columns_of(features, held(table)))
        ids = world.on_main(lambda: held(table).ids)
        store = load(data, "train", config.bindings(), ids, world, partial=True)
        store = with_features(store, features, columns, "train.csv", world)
        check_dims(store.dims, model.dims, f"{data}/embeddings/train")
        store = as_validated(store, model, run, config, chosen, world)
        as_trained = world.on_main(lambda: is_as_trained(settings.other_data, chosen, store, held(table), data))
        under_way = run.parts
        parts = parts_folder(under_way, origin, world)
        computed = named(compute_parts(pricing(model), store.resident_on(world.device), world, parts), model.named_rows)

        def finish() -> None:
            rows = _predictions(held(table), computed["price"], store.present)
            limits = intervals.intervals_of(chosen)
            rows, coverage = _with_bounds(rows, limits, run, chosen, held(table), computed, as_trained)
            by = held(table).frame[list(settings.by)]
            rows = rows.assign(**{name: list(computed[name]) for name in COMPARABLES if name in computed})
            evaluation = evaluate(rows, by, computed.get("gate"), as_trained=as_trained, coverage=coverage)
            _write(run, chosen, evaluation, rows)
            shown = _columns_of_report(settings.by, held(table).columns)
            _show(evaluation, held(table).frame.filter(items=list(dict.fromkeys(shown))))

        world.on_main(finish)
        world.on_main(lambda: discard(under_way))  # also what earlier ones left that did not end


def as_validated(
    store: RowStore, model: PriceModel, run: RunFolder, config: RunConfig, chosen: manifests.Checkpoint, world: World
) -> RowStore:
    """The validation rows such that the model prices each as in training: by the members that held it out.

    The model forgets the rows of its memory that all of its members held out.
    """
    folds, groups = world.on_main(lambda: _validating_parts(run, config, chosen))
    if model.memory is not None:
        model.memory = model.memory.without(config.held_out())
    return replace(store, folds=torch.from_numpy(folds), groups=torch.from_numpy(groups))


def _validating_parts(run: RunFolder, config: RunConfig, chosen: manifests.Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """[n] part of the split that each validation row is in, and [n] its group."""
    split = read_split(run, chosen.manifest.split_sha256)
    validates = (split["side"] == "validation").to_numpy(bool)
    return part_of(split, config.held_out()[0])[validates], split["group"].to_numpy(np.int64)[validates]


def _with_bounds(
    rows: pd.DataFrame,
    limits: Intervals | None,
    run: RunFolder,
    chosen: manifests.Checkpoint,
    table: Table,
    computed: Arrays,
    as_trained: bool | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows with the bounds of their intervals, and how many prices lie within; empty if there are no intervals.

    Where these are the rows that the run's intervals were made of, each gets bounds from the other groups of rows.
    """
    if limits is None:
        return rows, pd.DataFrame()
    known = computed_frame(computed, intervals.category_of(table, limits.by)).assign(price=rows["price"])
    if as_trained is False:
        found: dict[str, np.ndarray] | None = intervals.bounds(limits, known)
    else:
        split = read_split(run, chosen.manifest.split_sha256)
        found = intervals.crossed(known, split.loc[split["side"] == "validation", "group"].to_numpy(), limits.by)
    if found is None:
        return rows, pd.DataFrame()
    return rows.assign(**found), intervals.coverage(limits, known.assign(**found))


def is_as_trained(
    other_data: bool, chosen: manifests.Checkpoint, store: RowStore, table: Table, data: str
) -> bool | None:
    """Whether the validation rows are what they were in training; None if the run does not say.

    Args:
        other_data: whether other rows will do.

    Raises:
        DataError: they are not, and `other_data` was not given. Rows under other ids may be rows that were trained on.
    """
    if not chosen.manifest.validation_sha256:  # of an earlier version
        log.warning(event="data_not_compared", reason="this run does not say what it validated on")
        return None
    found = validation_digest(store, torch.arange(len(store)), table.prices)
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
    """The rows of `train.csv` that the run validated on, sorted by sample_id, with columns to show.

    Args:
        by: columns to group them by.

    Raises:
        DataError: a row, or a column to group by, is not there.
    """
    split = read_split(run, chosen.manifest.split_sha256)
    ids = pd.Index(split.loc[split["side"] == "validation", "sample_id"])
    drop = config.drop_bad_prices
    table = read_table(
        data,
        "train",
        priced=True,
        drop_bad_prices=drop,
        columns=lambda names: [*_columns_of_report(by, names), *others],
    )
    for column in by:
        table.column(column, "--by")
    places = positions_of(ids, table.ids)
    lost = ids[places < 0]
    if len(lost):
        raise DataError(
            f"{len(lost)} validation rows of the run are not in {data}/train.csv, the first: {', '.join(lost[:5])}",
            "evaluate with the data that the run was trained on: --data",
        )
    return Table(table.frame.iloc[places], np.arange(len(ids)), table.columns)


def _columns_of_report(by: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns to group by, and those that the extreme rows are shown with, of the names of all columns."""
    others = [name for name in names if name and name not in ("sample_id", *COMPUTED)]
    return [*by, *others[: report.N_TEXTS]]


def _predictions(table: Table, prices: np.ndarray, present: Mapping[str, Tensor]) -> pd.DataFrame:
    """sample_id, price, predicted and, in words, which roles are present."""
    codes = sum(there.numpy().astype(np.int64) << number for number, there in enumerate(present.values()))
    found, positions = np.unique(np.asarray(codes), return_inverse=True)
    words = np.array([_in_words(int(code), list(present)) for code in found], dtype=object)
    columns = {"sample_id": table.ids, "price": table.prices, "predicted": prices, "present": words[positions]}
    return pd.DataFrame(columns)


def _in_words(code: int, roles: list[str]) -> str:
    missing = [role for number, role in enumerate(roles) if not code >> number & 1]
    if len(missing) == len(roles):
        return "none"
    return f"without {', '.join(missing)}" if missing else "all"


def _write(run: RunFolder, chosen: manifests.Checkpoint, evaluation: Evaluation, rows: pd.DataFrame) -> None:
    folder = run.metrics
    files = {
        "groups.parquet": _parquet(evaluation.groups),
        "predictions.parquet": _parquet(rows),
        "groups.csv": evaluation.groups.to_csv(index=False).encode(),
        "summary.json": _summary(run, chosen, evaluation),
    }
    data, model = chosen.manifest.data_sha256, chosen.model_sha256
    manifest = MetricsManifest(SCHEMA, manifests.entries(files), chosen.name, run.run_id, model, data)
    _replace(folder, files, seal(asdict(manifest)))
    log.info(event="evaluated", rows=len(rows), written=folder)


def _replace(folder: str, files: Mapping[str, bytes], manifest: bytes) -> None:
    """Of two evaluations at once the last one wins, whole."""
    url = storage.join(folder, manifests.MANIFEST)
    for _ in turns(url):
        storage.remove(url)  # who reads while they are replaced sees that they are
        manifests.write_files(folder, files)
        if storage.create(url, manifest):
            return


def _show(evaluation: Evaluation, columns: pd.DataFrame) -> None:
    """Prints it; the extreme rows with the columns of the user's whose names are not taken."""
    beside = columns.drop(columns=[name for name in columns if name in evaluation.worst])
    worst, best = (rows.join(beside, on="sample_id") for rows in (evaluation.worst, evaluation.best))
    note = ", with other prices or embeddings than in training" if evaluation.as_trained is False else ""
    report.show(evaluation.groups, worst, best, evaluation.gates, evaluation.distributions, note, evaluation.coverage)


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _summary(run: RunFolder, chosen: manifests.Checkpoint, evaluation: Evaluation) -> bytes:
    overall = evaluation.groups.iloc[0].drop(["by", "group"]).to_dict()
    columns = ["sample_id", "price", "predicted", "present", "smape"]
    summary: Mapping[str, Any] = {
        "run": run.run_id,
        "checkpoint": chosen.name,
        "rows": "validation",
        "as_trained": evaluation.as_trained,
        **json.loads(pd.Series(overall).to_json()),
        "worst": _records(evaluation.worst[columns]),
        "best": _records(evaluation.best[columns]),
        "gates": _records(evaluation.gates.rename_axis("price_bin").reset_index()),
        "distributions": _records(evaluation.distributions),
        "intervals": _records(evaluation.coverage),
    }
    return storage.as_json(summary)


def _records(frame: pd.DataFrame) -> Any:
    return json.loads(frame.to_json(orient="records"))  # NaN becomes null
