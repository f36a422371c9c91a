"""Prices for rows, and the submission made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor, nn

from fusion import log, storage
from fusion.config import PredictConfig, ReadRunConfig, RunConfig, digest
from fusion.data.embeddings import load
from fusion.data.inputs import find_inputs, find_table
from fusion.data.row_store import RowStore
from fusion.data.tables import Table, read_table
from fusion.distributed.world import World, held, join_world
from fusion.errors import DataError, DivergedError, UnreachableError
from fusion.features.fitted import Features, columns_of, has_features, read_features
from fusion.features.rows import compared, with_features
from fusion.metrics import bootstrap_interval, row_smape
from fusion.nn.approximate import HINT, is_installed
from fusion.nn.neighbours import Memory
from fusion.nn.price_model import Options, PriceModel, network_dims
from fusion.prediction.resumable import Arrays, Compute, compute_parts, compute_rows, discard
from fusion.records import checkpoint, find_run, intervals, manifests, memory
from fusion.records.manifests import FINGERPRINTS, PREDICTIONS, SUBMISSION
from fusion.records.run import RunFolder
from fusion.records.schemas import Intervals
from fusion.records.validation import computed_frame
from fusion.submissions import guards, predictions, submission
from fusion.submissions.fingerprints import Look, look, to_parquet
from fusion.submissions.unchanged import republish

C = TypeVar("C", bound=RunConfig)
BuildNetwork = Callable[[C, Mapping[str, int]], nn.Module]


def predict_rows(compute: Compute, store: RowStore, rows: Tensor, world: World) -> Arrays:
    """What `compute` says of the store's rows [n], name to [n, …], in their order: each once over all ranks.

    Rank 0 has them all; the others have none.
    """
    mine = compute_rows(compute, store, rows[world.share(len(rows))], world.device)
    parts = [part for part in world.gather_on_main(mine) if part]  # a rank may have no rows
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else {})}


def validation_digest(store: RowStore, rows: Tensor, prices: np.ndarray) -> str:
    """sha256 of what is validated on: the store's rows [n] and their prices [n], in the order of their ids."""
    return digest([store.digest_of(rows), storage.sha256(np.ascontiguousarray(prices, np.float64).tobytes())])


def pricing(model: PriceModel) -> Compute:
    """What computes {"price": [B] in dollars, float64} with a model, which it sets to evaluate."""
    model.eval()
    return model.explained


def parts_folder(parent: str, origin: submission.Origin, world: World) -> str:
    """Where parts of what is made of `origin` are kept; another kind of device rounds differently."""
    return storage.join(parent, f"{origin.key()[:12]}-{world.device.type}")


def open_run(
    settings: ReadRunConfig, config_class: type[C], world: World
) -> tuple[RunFolder, C, manifests.Checkpoint, str]:
    """As `find_run.open_run`, on every rank, and where the data are; from here on the log carries the run's name."""
    run, config, best = world.on_main(lambda: find_run.open_run(settings, config_class))
    log.configure(run.run_id, world.rank, world.size)
    return run, config, best, world.on_main(lambda: find_run.data_of(settings, config.data))


def load_model(chosen: manifests.Checkpoint, config: C, build_network: BuildNetwork[C], world: World) -> PriceModel:
    """The model of a checkpoint, verified, on this rank's device."""
    tensors, dims = world.on_main(lambda: checkpoint.read_model(chosen))
    model = make_model(config, build_network, dims)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{chosen.url} was made by another version of this model: {reason}", "train again") from error
    if config.neighbours:
        remembered = world.on_main(lambda: memory.read(RunFolder.of_checkpoint(chosen), chosen.manifest.memory_sha256))
        model.memory = _searchable(remembered.memory, world).to(world.device)
        model.named_rows = pd.Series(remembered.prices, remembered.ids)
    return model.to(world.device)


def _searchable(remembered: Memory, world: World) -> Memory:
    """The memory, searched exactly where faiss is missing: the prices of a night are worth the time that this takes."""
    if remembered.partition is None or world.device.type != "cpu" or is_installed():
        return remembered
    reason = f"neighbours of each row are looked for among all {len(remembered)}, which takes several times as long"
    log.warning(event="no_faiss", reason=reason, hint=HINT)
    return replace(remembered, partition=None)


def named(computed: Arrays, known: pd.Series) -> Arrays:
    """What was computed, with the ids and prices of comparable products in place of their rows.

    Args:
        known: prices in dollars of the rows, in their order, by sample id.
    """
    if "comparable_rows" not in computed:
        return computed
    rows = computed["comparable_rows"]
    named_here = {"comparable_ids": known.index.to_numpy()[rows], "comparable_prices": known.to_numpy()[rows]}
    return {**{name: values for name, values in computed.items() if name != "comparable_rows"}, **named_here}


def make_model(config: C, build_network: BuildNetwork[C], dims: Mapping[str, int]) -> PriceModel:
    """A model with its first weights, which torch's generator decides."""
    options = Options(
        config.held_out(),
        config.components,
        config.neighbours,
        config.neighbour_dropout,
        config.input_dropout,
        config.input_noise,
        config.modality_dropout,
    )
    seen = network_dims(dims, options)
    return PriceModel([build_network(config, seen) for _ in options.held_out], dims, options)


def features_of(run: RunFolder, config: RunConfig, chosen: manifests.Checkpoint) -> Features | None:
    """What the run computes from a table, verified; None if it reads all its sources."""
    return read_features(run, chosen.manifest.features_sha256) if has_features(config) else None


def check_dims(found: Mapping[str, int], trained: Mapping[str, int], where: str) -> None:
    """Raises a DataError that names both when the data's dimensions are not the model's."""
    wrong = {role: (found[role], dim) for role, dim in trained.items() if found[role] != dim}
    for role, (dim, expected) in wrong.items():
        raise DataError(
            f"{role} has {dim} dimensions in {where}, the model was trained with {expected}",
            "use embeddings of the encoder it was trained with, or train again",
        )


def predict_test(settings: PredictConfig, config_class: type[C], build_network: BuildNetwork[C]) -> None:
    """Predicts `test.csv` with a run's best checkpoint and publishes the submission; an unchanged one is not repeated.

    Raises:
        DataError: no such run, bad input, dimensions other than the model's, or prices that do not pass the checks.
        UnreachableError: the input was written meanwhile.
        StopRequested: a signal came; the parts that are done are kept.
    """
    with join_world(settings.device) as world:
        settings = replace(settings, date=world.on_main(settings.day))  # one day for all ranks, also around midnight
        if world.on_main(lambda: republish(settings, config_class.variant)):
            return
        run, config, chosen, data = open_run(settings, config_class, world)
        features = world.on_main(lambda: features_of(run, config, chosen))
        inputs = world.on_main(lambda: find_inputs(data, "test", config.bindings()))
        origin = world.on_main(lambda: submission.origin_of(run, chosen, config, data, found=inputs))
        under_way = storage.join(settings.output, "parts", settings.name)
        parts = parts_folder(under_way, origin, world)
        if world.on_main(lambda: submission.reuse(settings, origin)):
            world.on_main(lambda: discard(under_way))  # of one that was killed after it had published
            return
        model = load_model(chosen, config, build_network, world)
        limits = world.on_main_alone(lambda: intervals.intervals_of(chosen))
        names = ["price", *([limits.by] if limits else []), *(features.names if features else [])]
        table = world.on_main_alone(lambda: read_table(data, "test", priced=False, columns=names))
        columns = world.on_main_alone(lambda: columns_of(features, held(table)))
        ids = world.on_main(lambda: held(table).ids)
        bindings, sources = config.bindings(), inputs.sources
        most = config.max_missing if settings.max_missing is None else settings.max_missing
        store = load(data, "test", bindings, ids, world, max_missing=most, sources=sources)
        store = with_features(store, features, columns, "test.csv", world)
        check_dims(store.dims, model.dims, f"{data}/embeddings/test")
        if world.on_main(lambda: find_table(data, "test")) != inputs.table:
            raise UnreachableError(
                f"{inputs.table[0].url} was written while it was read", "run it again once it is complete"
            )
        store, last = store.resident_on(world.device), world.on_main_alone(lambda: submission.last(settings))
        seen = look(model, compared(store), ids, world)
        about = guards.about_embeddings(seen, chosen.manifest.agreement, last, origin)
        world.on_main(lambda: guards.conclude(settings, about))  # before they are priced: a refusal costs seconds
        computed = named(compute_parts(pricing(model), store, world, parts), model.named_rows)
        try:
            world.on_main(
                lambda: publish_prices(settings, origin, chosen.smape, held(table), computed, limits, seen, last)
            )
        except (DataError, DivergedError):
            world.on_main(lambda: discard(under_way))  # refused: the input or the model will be replaced
            raise
        world.on_main(lambda: discard(under_way))  # also what earlier nights left that did not end


def publish_prices(
    settings: PredictConfig,
    origin: submission.Origin,
    smape: float,
    table: Table,
    computed: Arrays,
    limits: Intervals | None,
    seen: Look,
    last: submission.Last | None,
) -> None:
    """Publishes what was computed of the table's rows, in its order, unless a guard refuses the prices.

    Args:
        smape: of the model on its validation rows.
        computed: "price" [N] in dollars, and further columns.
        seen: the embeddings that the prices were made of.
    """
    prices = computed["price"]
    warn_of_leak(table, prices, smape)
    priced = pd.Series(prices, table.ids)
    guards.conclude(settings, guards.about_prices(settings, priced, smape, last, origin))
    files = {
        SUBMISSION: submission.submission_csv(list(table.ids[table.file_order]), prices[table.file_order]),
        PREDICTIONS: _predictions(table, computed, limits),
        FINGERPRINTS: to_parquet(seen.prints.iloc[table.file_order]),
    }
    history = guards.remembered(priced, last, settings.day(), origin.model_sha256)
    submission.publish(settings, origin, submission.Made(files, len(table), smape, history))


def _predictions(table: Table, computed: Arrays, limits: Intervals | None) -> bytes:
    """`predictions.parquet`: of each row its price, the bounds of its intervals, and whatever else was computed."""
    category = None if limits is None else intervals.category_of(table, limits.by)
    _warn_of_intervals(table, limits, category)

    def rows_of(part: slice) -> dict[str, Any]:
        rows = table.file_order[part]
        here = {name: values[rows] for name, values in computed.items()}
        known = computed_frame(here, None if category is None else category.iloc[rows])
        bounds = {} if limits is None else intervals.bounds(limits, known)
        return {"sample_id": table.ids[rows], "price": here["price"], **bounds, **here}

    return predictions.to_parquet(len(table), rows_of)


def _warn_of_intervals(table: Table, limits: Intervals | None, category: pd.Series | None) -> None:
    if limits is None:
        log.warning(event="no_intervals", reason="an earlier version trained this run, or it validated on few rows")
    elif limits.by and category is None:
        log.warning(event="column_missing", column=limits.by, reason=f"{table.name} lacks what intervals were made by")


def warn_of_leak(table: Table, prices: np.ndarray, validation_smape: float) -> None:
    """Warns when test rows that have prices are predicted far worse than validation promised.

    Embeddings whose encoder was tuned on training prices do that: the validation rows are no news to the encoder.
    """
    if "price" not in table.frame.columns:
        return
    truth = pd.to_numeric(table.frame["price"], errors="coerce").to_numpy(np.float64)
    priced = np.isfinite(truth) & (truth > 0)
    if not priced.any():
        return
    errors = row_smape(truth[priced], prices[priced])
    low, high = bootstrap_interval(errors)
    log.info(event="test_prices", rows=int(priced.sum()), smape=float(errors.mean()), low=low, high=high)
    if low > validation_smape * 1.1:
        log.warning(
            event="validation_too_good",
            validation_smape=validation_smape,
            test_smape=float(errors.mean()),
            reason="an encoder that was tuned on training prices, or other prices in test",
        )
