"""Evaluates a run on its own validation rows, which its training has not seen, and writes metrics by group."""

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
from fusion.config import AblateConfig, EvaluateConfig, RunConfig
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
from fusion.report.publish import try_report
from fusion.submissions import submission
from fusion.submissions.predictions import COMPARABLES

# Characters of a text that `summary.json` has of each extreme row: enough for a title and the begin of a description.
LONGEST_TEXT = 1000
# Validation rows up to which the texts of comparable products are read: with five times as many rows in train.csv, that
# takes a few seconds.
MOST_VALIDATED = 200_000
# Columns of each row that the evaluation computes. Columns of `train.csv` with these names are not shown beside them.
COMPUTED = ("price", "predicted", "present", "smape")


def evaluate_by_groups(settings: EvaluateConfig, config_class: type[C], build_network: BuildNetwork[C]) -> None:
    """Predicts a run's validation rows with its best checkpoint, writes metrics by group and prints them.

    Raises:
        DataError: there is no such run or no such --by column, validation rows are missing from the data, or their
            prices or embeddings differ from those of the training.
        StopRequested: a signal asked to stop; the parts that are done are saved.
    """
    with join_world(settings.device) as world:
        run, config, chosen, data = open_run(settings, config_class, world)
        model = load_model(chosen, config, build_network, world)
        origin = world.on_main(lambda: submission.origin_of(run, chosen, config, data, "train"))
        shown = [intervals.category_column(config)]
        table, store, as_trained = read_validation(
            settings, run, config, chosen, model, data, world, settings.by, shown
        )
        parts, store = parts_folder(run.parts, origin, world), store.resident_on(world.device, settings.residency)
        computed = named(compute_parts(pricing(model), store, world, parts), model.named_rows)

        def finish() -> None:
            evaluation, rows = evaluation_of(settings.by, run, chosen, held(table), store, computed, as_trained)
            shown = _columns_of_report(settings.by, held(table).columns)
            columns = held(table).frame.filter(items=list(dict.fromkeys(shown)))
            others = _columns_of_comparables(evaluation, rows, config, data, list(dict.fromkeys(shown)))
            _write(run, chosen, evaluation, rows, pd.concat([columns, others.drop(columns.index, errors="ignore")]))
            _show(evaluation, columns, run.metrics.url, settings.all)

        world.on_main(finish)
        world.on_main(lambda: discard(run.parts))  # including those of earlier evaluations that were never finished
        world.on_main(lambda: try_report(run))


def evaluation_of(
    by: Sequence[str],
    run: RunFolder,
    chosen: manifests.Checkpoint,
    table: Table,
    store: RowStore,
    computed: Arrays,
    as_trained: bool | None,
) -> tuple[Evaluation, pd.DataFrame]:
    """The evaluation of a run's validation rows, and what was predicted for each of them.

    Args:
        by: columns of the table to group by.
        table, store, as_trained: as `read_validation` returns them.
        computed: what the model computes for the rows, with the names of comparable products.
    """
    rows = _predictions(table, computed["price"], store.present)
    limits = intervals.intervals_of(chosen)
    rows, coverage = _with_bounds(rows, limits, run, chosen, table, computed, as_trained)
    rows = rows.assign(**{name: list(computed[name]) for name in COMPARABLES if name in computed})
    by_columns, gate = table.frame[list(by)], computed.get("gate")
    duplicates = None if store.groups is None else store.groups.cpu().numpy()
    evaluation = evaluate(rows, by_columns, gate, as_trained=as_trained, coverage=coverage, duplicates=duplicates)
    known = None if as_trained is False else run.baselines()  # other prices have other baselines
    return replace(evaluation, baselines=known), rows


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


def _with_bounds(
    rows: pd.DataFrame,
    limits: Intervals | None,
    run: RunFolder,
    chosen: manifests.Checkpoint,
    table: Table,
    computed: Arrays,
    as_trained: bool | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Adds interval bounds to the rows, and counts how many prices lie within them.

    The run's intervals were fitted on its validation rows, so they would cover these rows too well. Therefore they are
    fitted again by cross-fitting: the bounds of a row come from intervals that were fitted without its group. With
    `--other-data` (`as_trained` is False), the rows are new, and the run's own intervals apply.

    Returns:
        The rows with their bounds, and a table as of `intervals.coverage`, which is empty if there are no intervals.
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
        columns=lambda names: [*_columns_of_report(by, names), *others],
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


def _columns_of_report(by: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the columns that a report needs: those to group by, and the first others, to show with extreme rows."""
    others = [name for name in names if name and name not in ("sample_id", *COMPUTED)]
    return [*by, *others[: report.N_TEXTS]]


def _predictions(table: Table, prices: np.ndarray, present: Mapping[str, Tensor]) -> pd.DataFrame:
    """Returns a row per product: sample_id, price, predicted, and present, which says in words which roles it has."""
    # Bit i of a row's code says whether it has role i. There are few different codes, so each is put in words once.
    codes = sum(
        is_present.cpu().numpy().astype(np.int64) << number for number, is_present in enumerate(present.values())
    )
    found, positions = np.unique(np.asarray(codes), return_inverse=True)
    words = np.array([_in_words(int(code), list(present)) for code in found], dtype=object)
    columns = {"sample_id": table.ids, "price": table.prices, "predicted": prices, "present": words[positions]}
    return pd.DataFrame(columns)


def _in_words(code: int, roles: list[str]) -> str:
    """Returns "all", "none", or for example "without clip_image, qwen_text"."""
    missing = [role for number, role in enumerate(roles) if not code >> number & 1]
    if len(missing) == len(roles):
        return "none"
    return f"without {', '.join(missing)}" if missing else "all"


def _columns_of_comparables(
    evaluation: Evaluation, rows: pd.DataFrame, config: RunConfig, data: str, names: Sequence[str]
) -> pd.DataFrame:
    """Returns the user's columns of the products that weigh most in the worst rows, by sample_id.

    Without neighbours or with other data, the result is empty. It is also empty for a large table: reading the columns
    of all of its rows again would take too long.
    """
    none = pd.DataFrame(columns=list(names))
    if COMPARABLES[0] not in rows or evaluation.as_trained is False or not names:
        return none
    of_worst = rows.set_index("sample_id").loc[evaluation.worst["sample_id"], COMPARABLES[0]]
    if len(rows) > MOST_VALIDATED:
        return none
    drop = config.drop_bad_prices
    table = read_table(
        data,
        "train",
        priced=True,
        drop_bad_prices=drop,
        columns=lambda known: [name for name in names if name in known],
    )
    positions = positions_of(pd.Index(of_worst.explode().unique()), table.ids)
    return table.frame.iloc[positions[positions >= 0]].filter(items=list(names))


def _write(
    run: RunFolder, chosen: manifests.Checkpoint, evaluation: Evaluation, rows: pd.DataFrame, columns: pd.DataFrame
) -> None:
    """Writes the metrics, the predictions of the rows and a summary to the run's `metrics/`.

    Args:
        columns: the user's columns of extreme rows and of their comparable products, by sample_id.
    """
    folder = run.metrics
    files = {
        "groups.parquet": _parquet(evaluation.groups),
        "predictions.parquet": _parquet(rows),
        "groups.csv": evaluation.groups.to_csv(index=False).encode(),
        "summary.json": _summary(run, chosen, evaluation, columns),
    }
    data, model = chosen.manifest.data_sha256, chosen.model_sha256
    manifest = MetricsManifest(SCHEMA, manifests.entries(files), chosen.name, run.run_id, model, data)
    _replace(folder, files, seal(asdict(manifest)))
    log.info(event="evaluated", rows=len(rows), written=folder)


def _replace(folder: manifests.Folder, files: Mapping[str, bytes], manifest: bytes) -> None:
    """Replaces the files of an earlier evaluation, and their manifest.

    If two evaluations write at the same time, the files of the last one remain, and match their manifest.
    """
    url = folder.manifest_url
    for _ in turns(url):
        storage.remove(url)  # without a manifest, readers know that the files are being replaced
        manifests.write_files(folder, files)
        if storage.create(url, manifest):
            return


def _show(evaluation: Evaluation, columns: pd.DataFrame, written: str = "", everything: bool = True) -> None:
    """Prints the evaluation. Extreme rows get the user's columns, unless a computed column has the same name.

    Args:
        written: the folder with the metrics.
        everything: whether to print all tables.
    """
    shown = ["sample_id", *COMPUTED]
    others = columns.drop(columns=[name for name in columns if name in evaluation.worst])
    worst, best = (rows[shown].join(others, on="sample_id") for rows in (evaluation.worst, evaluation.best))
    note = ", with other prices or embeddings than in training" if evaluation.as_trained is False else ""
    report.show(replace(evaluation, worst=worst, best=best), note, written, everything)


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _summary(
    run: RunFolder, chosen: manifests.Checkpoint, evaluation: Evaluation, texts: pd.DataFrame | None = None
) -> bytes:
    """Returns the content of `summary.json`: overall metrics, extreme rows, gates, quantiles and coverage."""
    overall = evaluation.groups.iloc[0].drop(["by", "group"]).to_dict()
    columns = ["sample_id", "price", "predicted", "present", "smape"]
    compared = [COMPARABLES[0]] if COMPARABLES[0] in evaluation.worst and texts is not None else []
    summary: Mapping[str, Any] = {
        "run": run.run_id,
        "checkpoint": chosen.name,
        "rows": "validation",
        "as_trained": evaluation.as_trained,
        **json.loads(pd.Series(overall).to_json()),
        "baselines": [] if evaluation.baselines is None else [asdict(one) for one in evaluation.baselines.scores],
        "worst": _described(evaluation.worst[[*columns, *compared]], texts),
        "best": _described(evaluation.best[columns], texts),
        "gates": _records(evaluation.gates.rename_axis("price_bin").reset_index()),
        "distributions": _records(evaluation.distributions),
        "intervals": _records(evaluation.coverage),
    }
    return storage.as_json(summary)


def _described(extremes: pd.DataFrame, texts: pd.DataFrame | None) -> list[dict[str, Any]]:
    """The rows as records, with the user's columns of each under "columns", and of its comparable products."""
    found: list[dict[str, Any]] = _records(extremes)
    if texts is None:
        return found
    for record in found:
        record["columns"] = _texts(texts, record["sample_id"])
        if COMPARABLES[0] in record:
            record["comparables"] = {one: _texts(texts, one) for one in record.pop(COMPARABLES[0])}
    return found


def _texts(texts: pd.DataFrame, sample_id: str) -> dict[str, str]:
    """Returns name to text of the user's columns of a row that are not missing; nothing for an unknown row."""
    if sample_id not in texts.index:
        return {}
    row = texts.loc[sample_id]
    return {str(name): str(value)[:LONGEST_TEXT] for name, value in row.items() if pd.notna(value)}


def _records(frame: pd.DataFrame) -> Any:
    return json.loads(frame.to_json(orient="records"))  # NaN becomes null
