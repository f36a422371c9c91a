"""Predicts prices with the best checkpoint of a run, and publishes them as a submission.

Evaluation, ensembles and ablation use the same functions to open a run, load its model and check its data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor, nn

from fusion import log, storage
from fusion.config import PredictConfig, ReadRunConfig, RunConfig, digest
from fusion.data.blocks import Blocks, open_blocks
from fusion.data.embeddings import check_unchanged as check_sources
from fusion.data.embeddings import load
from fusion.data.inputs import Inputs, find_inputs, find_table
from fusion.data.row_store import RowStore
from fusion.data.tables import Table, read_table
from fusion.distributed.world import World, held, join_world
from fusion.errors import DataError, DivergedError, UnreachableError
from fusion.features.fitted import Columns, Features, columns_of, has_features, read_features
from fusion.features.rows import compared, with_features
from fusion.metrics import bootstrap_interval, row_smape
from fusion.nn.approximate import HINT, is_installed
from fusion.nn.neighbours import Memory
from fusion.nn.price_model import Options, PriceModel, network_dims
from fusion.prediction import summary
from fusion.prediction.resumable import (
    PART_ROWS,
    Arrays,
    Compute,
    compute_parts,
    compute_rows,
    concatenated,
    discard,
)
from fusion.records import checkpoint, find_run, intervals, manifests, memory
from fusion.records.manifests import FINGERPRINTS, PREDICTIONS, SUBMISSION
from fusion.records.output import OutputFolder
from fusion.records.run import RunFolder
from fusion.records.schemas import Intervals
from fusion.records.validation import computed_frame
from fusion.submissions import guards, predictions, submission
from fusion.submissions.fingerprints import EmbeddingStatistics, Sums, joined, statistics_of, sums_of, to_parquet
from fusion.submissions.unchanged import republish

C = TypeVar("C", bound=RunConfig)
BuildNetwork = Callable[[C, Mapping[str, int]], nn.Module]  # from a config and role to dimension
# `warn_of_leak` warns if the SMAPE of test rows is above that of validation rows by more than this factor, even at the
# low end of its 95% interval. Smaller differences also arise between samples of the same data.
LEAK_FACTOR = 1.1
# Parts that a prediction reads at a time if it does not read all rows at once. Two parts have the rows of one file of
# `fusion.prepare`, so the number is even; 65,536 rows of the published dimensions take 1 GB.
BLOCK_PARTS = 8


def predict_rows(compute: Compute, store: RowStore, rows: Tensor, world: World, chunk: int | None = None) -> Arrays:
    """Returns the outputs of `compute` for the rows at these positions [n] of the store, as name to [n, …].

    The ranks divide the rows. Rank 0 gets all results, in the order of the rows; other ranks get an empty result.

    Args:
        rows: ascending, if each node holds only some rows.
        chunk: rows per forward pass; by default `resumable.CHUNK`.
    """
    share = rows[world.share(len(rows))] if store.nodes is None else store.nodes.share(rows, world)
    mine = compute_rows(compute, store, share, world.device, chunk)
    return concatenated([part for part in world.gather_on_main(mine) if part])  # a rank without rows has no arrays


def validation_digest(embeddings: str, prices: np.ndarray) -> str:
    """Returns a sha256 of the validation rows: of their embeddings (`RowStore.digest_of`), and of their prices [n]."""
    return digest([embeddings, storage.sha256(np.ascontiguousarray(prices, np.float64).tobytes())])


def pricing(model: PriceModel) -> Compute:
    """Puts the model in evaluation mode, and returns the function that computes prices with it.

    Its outputs are "price" [B], in dollars, float64, and further ones such as "spread" and "comparable_rows".
    """
    model.eval()
    return model.explained


def all_parts(settings: PredictConfig) -> str:
    """Returns the folder that the saved parts of all predictions under this name are in."""
    return OutputFolder(settings.output).at("parts", settings.name)


def parts_folder(parent: str, origin: submission.Origin, world: World) -> str:
    """Returns the folder of the saved parts (see `resumable`) of a computation on these inputs with this model.

    Each kind of device has its own folder, because devices round differently.
    """
    return storage.join(parent, f"{origin.key()[:12]}-{world.device.type}")


def open_run(
    settings: ReadRunConfig, config_class: type[C], world: World
) -> tuple[RunFolder, C, manifests.Checkpoint, str]:
    """Opens the run that the settings name, on every rank; from then on, log lines contain its id.

    Returns:
        What `find_run.open_run` returns (the run, its config and its best checkpoint), and the URL of the data.
    """
    run, config, best = world.on_main(lambda: find_run.open_run(settings, config_class))
    log.configure(run.run_id, world.rank, world.size)
    return run, config, best, world.on_main(lambda: find_run.data_of(settings, config.data))


def load_model(chosen: manifests.Checkpoint, config: C, build_network: BuildNetwork[C], world: World) -> PriceModel:
    """Reads the model of a checkpoint, and its memory, to this rank's device, and verifies their sha256.

    Raises:
        DataError: a file is damaged, or another version of the code wrote it.
    """
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
    """Returns the memory, without its inverted lists if faiss, which searches them, is needed and not installed.

    Then the search compares with all rows. A prediction that takes longer is better than one that fails.
    """
    if remembered.partition is None or world.device.type != "cpu" or is_installed():
        return remembered
    reason = f"each row is compared with all {len(remembered)} labelled rows, which takes several times as long"
    log.warning(event="no_faiss", reason=reason, hint=HINT)
    return replace(remembered, partition=None)


def named(computed: Arrays, known: pd.Series) -> Arrays:
    """Replaces "comparable_rows", positions in the memory, by "comparable_ids" and "comparable_prices".

    Outputs of a model without neighbours, which have no comparable products, are returned unchanged.

    Args:
        known: the price in dollars of each row of the memory, in its order; the index is their sample id.
    """
    if "comparable_rows" not in computed:
        return computed
    rows = computed["comparable_rows"]
    others = {name: values for name, values in computed.items() if name != "comparable_rows"}
    return {
        **others,
        "comparable_ids": known.index.to_numpy()[rows],
        "comparable_prices": known.to_numpy()[rows],
    }


def make_model(config: C, build_network: BuildNetwork[C], dims: Mapping[str, int]) -> PriceModel:
    """Returns a new model for roles of these dimensions; torch's random generator decides its initial weights."""
    options = Options(
        config.held_out(),
        config.components,
        config.neighbours,
        config.neighbour_dropout,
        config.input_dropout,
        config.input_noise,
        config.modality_dropout,
    )
    of_network = network_dims(dims, options)
    return PriceModel([build_network(config, of_network) for _ in options.held_out], dims, options)


def features_of(run: RunFolder, config: RunConfig, chosen: manifests.Checkpoint) -> Features | None:
    """Reads and verifies the features that the run computes from a table; None if it computes none."""
    return read_features(run, chosen.manifest.features_sha256) if has_features(config) else None


def check_dims(found: Mapping[str, int], trained: Mapping[str, int], where: str) -> None:
    """Raises DataError if a role has another dimension in the data than in the trained model.

    Args:
        where: the location of the data, for the message.
    """
    wrong = {role: (found[role], dim) for role, dim in trained.items() if found[role] != dim}
    for role, (dim, expected) in wrong.items():
        raise DataError(
            f"{role} has {dim} dimensions in {where}, the model was trained with {expected}",
            "use embeddings of the encoder that the model was trained with, or train again",
        )


def predict_test(settings: PredictConfig, config_class: type[C], build_network: BuildNetwork[C]) -> None:
    """Predicts `test.csv` with the best checkpoint of a run, and publishes the submission.

    If neither the model nor the input has changed since the last submission, nothing is computed again.

    Raises:
        DataError: there is no such run, the input is bad or has other dimensions than the model, or a guard refuses the
            embeddings or the prices.
        UnreachableError: the input was changed while it was read.
        StopRequested: a signal asked to stop; the parts that are done are saved.
    """
    with join_world(settings.device) as world:
        settings = replace(settings, date=world.on_main(settings.day))  # so that midnight cannot divide the ranks
        if known := world.on_main(lambda: republish(settings, config_class.variant)):
            world.on_main(lambda: summary.show_published(known))
            return
        run, config, chosen, data = open_run(settings, config_class, world)
        features = world.on_main(lambda: features_of(run, config, chosen))
        inputs = world.on_main(lambda: find_inputs(data, "test", config.bindings()))
        origin = world.on_main(lambda: submission.origin_of(run, chosen, config, data, found=inputs))
        if reused := world.on_main(lambda: submission.reuse(settings, origin)):
            world.on_main(lambda: summary.show_published(reused))
            world.on_main(lambda: discard(all_parts(settings)))  # left by a job that was killed after it had published
            return
        model = load_model(chosen, config, build_network, world)
        _predict(settings, config, chosen, model, features, inputs, origin, world)


def _predict(
    settings: PredictConfig,
    config: RunConfig,
    chosen: manifests.Checkpoint,
    model: PriceModel,
    features: Features | None,
    inputs: Inputs,
    origin: submission.Origin,
    world: World,
) -> None:
    """Reads the rows, checks their embeddings, computes their prices, and publishes them."""
    data = origin.data
    limits = world.on_main_alone(lambda: intervals.intervals_of(chosen))
    names = ["price", *([limits.by] if limits else []), *(features.names if features else [])]
    table = world.on_main_alone(lambda: read_table(data, "test", priced=False, columns=names))
    columns = world.on_main_alone(lambda: columns_of(features, held(table)))
    ids = world.on_main(lambda: held(table).ids)
    max_missing = config.max_missing if settings.max_missing is None else settings.max_missing
    last = cache(lambda: submission.last_submission(settings))  # called on rank 0 only
    rows = Predicted(settings, config, model, features, inputs, origin, ids, max_missing)
    blocks = None
    if settings.cache is None:  # rows in a cache are not in memory
        blocks = open_blocks(data, "test", config.bindings(), inputs.sources, ids, block_rows(world), world)

    def check(seen: EmbeddingStatistics) -> None:
        guards.conclude(settings, guards.about_embeddings(seen, chosen.manifest.agreement, last(), origin))

    if blocks is None:
        seen, computed = _at_once(rows, columns, lambda seen: world.on_main(lambda: check(seen)), world)
    else:
        seen, computed = _in_blocks(rows, columns, blocks, world)

    def publish() -> None:
        if blocks is not None:
            blocks.report(max_missing)
            check(seen)
        publish_prices(settings, origin, chosen.smape, held(table), computed, limits, seen, last())

    publish_and_discard(settings, publish, world)


@dataclass(frozen=True)
class Predicted:
    """What the rows of a table are predicted with.

    Attributes:
        features: what the model computes from the table; None if it computes nothing.
        ids: [N] sample ids of the table.
        max_missing: largest share of the rows that a source may lack.
    """

    settings: PredictConfig
    config: RunConfig
    model: PriceModel
    features: Features | None
    inputs: Inputs
    origin: submission.Origin
    ids: pd.Index
    max_missing: float

    def prepared(self, store: RowStore, columns: Columns | None, world: World) -> RowStore:
        """The store with computed sources, where the model reads it. Raises DataError if a dimension is wrong."""
        store = with_features(store, self.features, columns, "test.csv", world)
        check_dims(store.dims, self.model.dims, f"{self.origin.data}/embeddings/test")
        return store.resident_on(world.device, self.settings.residency)

    def parts(self, world: World) -> str:
        return parts_folder(all_parts(self.settings), self.origin, world)


def block_rows(world: World) -> int:
    """Rows that a prediction of a large table reads at a time: a part for each rank, and at least `BLOCK_PARTS`."""
    return PART_ROWS * max(BLOCK_PARTS, world.size + world.size % 2)


def _at_once(
    rows: Predicted, columns: Columns | None, check: Callable[[EmbeddingStatistics], None], world: World
) -> tuple[EmbeddingStatistics, Arrays]:
    """Reads all rows; computes their prices only if `check` does not raise an error about their embeddings."""
    data, bindings, sources = rows.origin.data, rows.config.bindings(), rows.inputs.sources
    missing, kept = rows.max_missing, rows.settings.cache
    store = load(data, "test", bindings, rows.ids, world, max_missing=missing, sources=sources, cache=kept)
    store = rows.prepared(store, columns, world)
    check_unchanged(rows.inputs, data, world)
    seen = statistics_of(rows.model, compared(store), rows.ids, world)
    check(seen)
    return seen, named(compute_parts(pricing(rows.model), store, world, rows.parts(world)), rows.model.named_rows)


def _in_blocks(
    rows: Predicted, columns: Columns | None, blocks: Blocks, world: World
) -> tuple[EmbeddingStatistics, Arrays]:
    """Reads one block of rows after the other, and computes its prices. The rows are checked as a whole afterwards."""
    sums, computed, compute, folder = list[Sums](), list[Arrays](), pricing(rows.model), rows.parts(world)
    n_rows = len(rows.ids)
    for first, block in blocks.read():
        cut = None if columns is None else {name: one.slice(first, len(block)) for name, one in columns.items()}
        store = rows.prepared(block, cut, world)
        sums.append(sums_of(rows.model, compared(store), rows.ids[first : first + len(block)], world))
        computed.append(compute_parts(compute, store, world, folder, first_row=first, n_rows=n_rows))
    check_sources(rows.origin.data, "test", rows.config.bindings(), rows.inputs.sources, world)
    check_unchanged(rows.inputs, rows.origin.data, world)
    return joined(sums), named(concatenated(computed), rows.model.named_rows)


def check_unchanged(inputs: Inputs, data: str, world: World) -> None:
    """Raises UnreachableError if the table of `test.csv` was written since the inputs were listed."""
    if world.on_main(lambda: find_table(data, "test")) != inputs.table:
        raise UnreachableError(
            f"{inputs.table[0].url} was written while it was read", "run it again once it is complete"
        )


def publish_and_discard(settings: PredictConfig, publish: Callable[[], None], world: World) -> None:
    """Calls `publish` on rank 0, and then removes all saved parts, including those of jobs that were never finished.

    They are also removed if a guard refuses the prices, since the next attempt needs another input or another model.
    """
    parts = all_parts(settings)
    try:
        world.on_main(publish)
    except (DataError, DivergedError):
        world.on_main(lambda: discard(parts))
        raise
    world.on_main(lambda: discard(parts))


def publish_prices(
    settings: PredictConfig,
    origin: submission.Origin,
    smape: float,
    table: Table,
    computed: Arrays,
    limits: Intervals | None,
    seen: EmbeddingStatistics,
    last: submission.LastSubmission | None,
) -> None:
    """Publishes the prices of the table's N rows, in the order of its file, unless a guard refuses them.

    Args:
        smape: SMAPE in percent of the model on its validation rows.
        computed: outputs for the rows, sorted by sample_id: "price" [N] in dollars, and others.
        limits: the model's intervals; None if it has none.
        seen: statistics of the embeddings that the prices were computed from.
        last: the submission before this one; None if there is none.

    Raises:
        DataError, DivergedError: a guard refuses the prices.
    """
    prices = computed["price"]
    warn_of_leak(table, prices, smape)
    priced = pd.Series(prices, table.ids)
    guards.conclude(settings, guards.about_prices(settings, priced, smape, last, origin))
    files = {
        SUBMISSION: submission.submission_csv(list(table.ids[table.file_order]), prices[table.file_order]),
        PREDICTIONS: predictions_parquet(table, computed, limits),
        FINGERPRINTS: to_parquet(seen.prints.iloc[table.file_order]),
    }
    history = guards.remembered(priced, last, settings.day(), origin.model_sha256)
    facts = RunFolder(origin.run).facts_if_whole()
    trained = facts.price_quartiles if facts else None
    summary.log_quartiles(prices, trained)
    with log.waiting("writing the submission"):
        url = submission.publish(settings, origin, submission.SubmissionContent(files, len(table), smape, history))
    if summary.is_shown():
        summary.show(_first_rows(table, computed, limits), prices, trained, url)


def _first_rows(table: Table, computed: Arrays, limits: Intervals | None) -> pd.DataFrame:
    category = None if limits is None else intervals.category_of(table, limits.by)
    rows = _rows(table, computed, limits, category, slice(0, summary.N_EXAMPLES))
    return pd.DataFrame({name: list(values) for name, values in rows.items()})


def predictions_parquet(table: Table, computed: Arrays, limits: Intervals | None) -> bytes:
    """Returns the content of `predictions.parquet`: each row's price, interval bounds and other outputs."""
    category = None if limits is None else intervals.category_of(table, limits.by)
    _warn_of_intervals(table, limits, category)
    return predictions.to_parquet(len(table), partial(_rows, table, computed, limits, category))


def _rows(
    table: Table, computed: Arrays, limits: Intervals | None, category: pd.Series | None, part: slice
) -> dict[str, Any]:
    """The columns of some rows of `predictions.parquet`, in the order of the table's file."""
    rows = table.file_order[part]
    here = {name: values[rows] for name, values in computed.items()}
    known = computed_frame(here, None if category is None else category.iloc[rows])
    bounds = {} if limits is None else intervals.bounds(limits, known)
    return {"sample_id": table.ids[rows], "price": here["price"], **bounds, **here}


def _warn_of_intervals(table: Table, limits: Intervals | None, category: pd.Series | None) -> None:
    """Warns if prices get no intervals, or intervals that do not depend on the row's category."""
    if limits is None:
        log.warning(
            event="no_intervals", reason="an earlier version trained this run, or it had too few validation rows"
        )
    elif limits.by and category is None:
        log.warning(
            event="column_missing",
            column=limits.by,
            reason=f"intervals depend on this column, which {table.name} lacks",
        )


def warn_of_leak(table: Table, prices: np.ndarray, validation_smape: float) -> None:
    """Warns if `test.csv` has prices, and these are predicted much worse than those of the validation rows.

    This happens if an encoder was fine-tuned on the prices of `train.csv`: the embeddings of validation rows then
    reveal their prices, and the validation SMAPE is too low.

    Args:
        prices: [N] predicted prices of the table's rows.
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
    if low > validation_smape * LEAK_FACTOR:
        log.warning(
            event="validation_too_good",
            validation_smape=validation_smape,
            test_smape=float(errors.mean()),
            reason="an encoder was fine-tuned on the training prices, or the test prices are of another kind",
        )
