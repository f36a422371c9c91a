"""Predicts prices with an ensemble: each row's log price is the weighted mean of the log prices of all members.

Variants give different roles to the same source. All sources are therefore read once, by their own names, and each
member gets a view of them by its roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from fusion import log, storage
from fusion.command.settings import from_json
from fusion.config import PredictConfig, RunConfig, digest
from fusion.data.embeddings import load
from fusion.data.inputs import Inputs, find_inputs, table_sha256
from fusion.data.row_store import RowStore
from fusion.data.tables import Table, read_table
from fusion.distributed.world import World, held, join_world
from fusion.ensemble.comparables import all_named, merged, positions_among
from fusion.errors import ConfigError, DataError
from fusion.features.fitted import Columns, Features, columns_of
from fusion.features.rows import compared, with_features
from fusion.nn.batch import Batch
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import (
    all_parts,
    check_dims,
    check_unchanged,
    features_of,
    load_model,
    named,
    parts_folder,
    pricing,
    publish_and_discard,
    publish_prices,
)
from fusion.prediction.resumable import Compute, compute_parts, discard
from fusion.records import find_run, schemas
from fusion.records.best_run import pointed_to
from fusion.records.manifests import ENSEMBLE, INTERVALS, Checkpoint
from fusion.records.output import OutputFolder
from fusion.records.provenance import ENSEMBLE_CODE, code_digest
from fusion.records.run import CONFIG, RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT, EnsembleMember, EnsembleRecord, Intervals
from fusion.submissions import guards, submission
from fusion.submissions.fingerprints import EmbeddingStatistics, statistics_of
from fusion.submissions.unchanged import republish
from fusion.variants import config_class_of, network_of


@dataclass(frozen=True)
class OpenedMember:
    """A member of an ensemble, with what has been read of its run.

    Attributes:
        chosen: the checkpoint that the ensemble uses.
        config: the settings of the member's training.
        features: what the member computes from the table; None if it computes nothing.
    """

    member: EnsembleMember
    chosen: Checkpoint
    config: RunConfig
    features: Features | None

    @property
    def bindings(self) -> dict[str, str]:
        """Role to the source that it is read from."""
        return self.config.bindings()

    @property
    def computed(self) -> dict[str, str]:
        """Computed role to its name in the store that all members share.

        The name contains a digest, because fold runs fit the same feature on different rows.
        """
        digest = self.chosen.manifest.features_sha256[:12]
        return {role: f"{role} {digest}" for role in self.features.dims} if self.features else {}


def predict_test(settings: PredictConfig) -> None:
    """Predicts `test.csv` with an ensemble, and publishes the submission.

    Raises:
        DataError: there is no such ensemble, a member is missing or has changed, or as in
            `fusion.prediction.predict.predict_test`.
        UnreachableError, StopRequested: as in that function.
    """
    with join_world(settings.device) as world:
        settings = replace(settings, date=world.on_main(settings.day))
        if world.on_main(lambda: republish(settings, ENSEMBLE_VARIANT, ENSEMBLE_CODE)):
            return
        folder, record, members = world.on_main(lambda: open_ensemble(settings))
        log.configure(record.run_id, world.rank, world.size)
        data = world.on_main(lambda: find_run.data_of(settings, record.data))
        inputs = world.on_main(lambda: find_inputs(data, "test", sources_of(members)))
        origin = world.on_main(lambda: _origin(folder, record, members, data, inputs))
        if world.on_main(lambda: submission.reuse(settings, origin)):
            world.on_main(lambda: discard(all_parts(settings)))  # left by a job that was killed after it had published
            return
        limits = world.on_main_alone(lambda: intervals_in(folder))
        _predict(settings, record, members, inputs, origin, limits, world)


def open_ensemble(settings: PredictConfig) -> tuple[RunFolder, EnsembleRecord, list[OpenedMember]]:
    """Opens the ensemble to use: that of `--run-dir`, else of `--run-id`, else the served one.

    Returns:
        Its folder, the content of its `ensemble.json`, and its members.
    """
    folder = _find(settings)
    record = folder.ensemble()
    return folder, record, [_open_member(folder.output, record, member) for member in record.members]


def _find(settings: PredictConfig) -> RunFolder:
    """Returns the folder of the ensemble to use.

    Raises:
        DataError: there is no such ensemble.
        ConfigError: the settings name a run that is not an ensemble.
    """
    hint = f"`python -m fusion.ensemble RUN RUN --output {settings.output}` makes one"
    if settings.run_dir:
        folder = RunFolder(settings.run_dir.rstrip("/"))
    elif settings.run_id:
        folder = RunFolder.named(settings.output, settings.run_id)
    else:
        best = pointed_to(settings.output, ENSEMBLE_VARIANT)
        if best is None:
            raise DataError(f"no ensemble under {settings.output}", hint)
        folder = RunFolder.named(settings.output, best.run_id)
    if storage.exists(folder.at(ENSEMBLE)):
        return folder
    facts = folder.facts_if_whole()
    if facts is not None and facts.variant != ENSEMBLE_VARIANT:
        raise ConfigError(
            f"run {folder.run_id} is a run of {facts.variant}, and this command predicts with ensembles",
            f"use python -m fusion.{facts.variant}.predict_test",
        )
    raise DataError(f"no ensemble {folder.run_id} under {settings.output}", hint)


def _open_member(output: str, record: EnsembleRecord, member: EnsembleMember) -> OpenedMember:
    """Reads the run of a member. Raises DataError if the checkpoint is missing or has another model."""
    run = RunFolder(OutputFolder(output).at(member.run))
    found = {made.name: made for made in run.checkpoints()}
    chosen = found.get(member.checkpoint)
    if chosen is None or chosen.model_sha256 != member.model_sha256:
        state = "does not exist" if chosen is None else "now has another model"
        raise DataError(
            f"the ensemble {record.run_id} needs {member.checkpoint} of {member.run}, which {state}",
            "restore that run, or make an ensemble of the runs that are left with python -m fusion.ensemble",
        )
    url = run.at(CONFIG)
    config = from_json(config_class_of(member.variant), storage.read(url), url)
    return OpenedMember(member, chosen, config, features_of(run, config, chosen))


def sources_of(members: Sequence[OpenedMember]) -> dict[str, str]:
    """Returns bindings for all sources that any member reads, in which each source is its own role."""
    return {name: name for opened in members for name in opened.bindings.values()}


def _origin(
    folder: RunFolder, record: EnsembleRecord, members: Sequence[OpenedMember], data: str, inputs: Inputs
) -> submission.Origin:
    """Returns what decides the prices: the members' models and weights, the data, and the code."""
    table, limits = table_sha256(inputs.table), folder.ensemble_file(INTERVALS)
    return submission.Origin(
        folder.url,
        ENSEMBLE,
        record.model_sha256(),
        data,
        table,
        digest([table, inputs.sources_digest()]),
        code_digest(ENSEMBLE_CODE),
        record.data,
        sources_of(members),
        inputs.version(),
        "" if limits is None else storage.sha256(limits),
    )


def intervals_in(folder: RunFolder) -> Intervals | None:
    content = folder.ensemble_file(INTERVALS)
    return None if content is None else schemas.parse(Intervals, content, folder.at(INTERVALS))


def _predict(
    settings: PredictConfig,
    record: EnsembleRecord,
    members: Sequence[OpenedMember],
    inputs: Inputs,
    origin: submission.Origin,
    limits: Intervals | None,
    world: World,
) -> None:
    """Reads the rows, checks their embeddings, computes their prices, and publishes them."""
    data = origin.data
    models = models_of(members, world)
    columns = {"price", *([limits.by] if limits else []), *columns_needed(members)}
    table = world.on_main_alone(lambda: read_table(data, "test", priced=False, columns=columns))
    ids = world.on_main(lambda: held(table).ids)
    max_missing = settings.max_missing
    if max_missing is None:
        max_missing = min(opened.config.max_missing for opened in members)
    names, sources, cache = sources_of(members), inputs.sources, settings.cache
    store = load(data, "test", names, ids, world, max_missing=max_missing, sources=sources, cache=cache)
    store = with_computed(store, members, table, world)
    for opened, model in zip(members, models, strict=True):
        check_dims(view_of(store, opened).dims, model.dims, f"{data}/embeddings/test")
    check_unchanged(inputs, data, world)
    store = store.resident_on(world.device, settings.residency)
    last = world.on_main_alone(lambda: submission.last_submission(settings))
    seen, agreement = _statistics(members, models, store, ids, world)
    about = guards.about_embeddings(seen, agreement, last, origin)
    world.on_main(lambda: guards.conclude(settings, about))
    known = all_named(models)
    compute = weighted_mean_of(members, models, positions_among(known, models, world.device))
    parts = parts_folder(all_parts(settings), origin, world)
    computed = named(compute_parts(compute, store, world, parts), known)

    def publish() -> None:
        publish_prices(settings, origin, record.smape, held(table), computed, limits, seen, last)

    publish_and_discard(settings, publish, world)


def models_of(members: Sequence[OpenedMember], world: World) -> list[PriceModel]:
    """The model of each member, on this rank's device."""
    return [load_model(opened.chosen, opened.config, network_of(opened.member.variant), world) for opened in members]


def columns_needed(members: Sequence[OpenedMember]) -> list[str]:
    """The columns that members compute sources from."""
    return list(dict.fromkeys(name for opened in members if opened.features for name in opened.features.names))


def view_of(store: RowStore, opened: OpenedMember) -> RowStore:
    """Returns the store's rows by the roles of the member, instead of by the names of sources."""
    return RowStore(_by_role(store.values, opened), _by_role(store.present, opened), tuple(opened.computed))


def _by_role(by_name: Mapping[str, Tensor], opened: OpenedMember) -> dict[str, Tensor]:
    return {role: by_name[name] for role, name in {**opened.bindings, **opened.computed}.items()}


def with_computed(
    store: RowStore, members: Sequence[OpenedMember], table: Table | None, world: World, name: str = "test.csv"
) -> RowStore:
    """Adds the features that each member computes from the table; equal features are computed only once.

    Args:
        table: on rank 0.
        name: of the table, for messages.
    """
    values, present = dict(store.values), dict(store.present)
    for opened in members:
        if opened.features is None or set(opened.computed.values()) <= values.keys():
            continue
        columns = world.on_main_alone(partial(_columns, opened.features, table))
        made = with_features(store, opened.features, columns, name, world)
        values |= {name: made.values[role] for role, name in opened.computed.items()}
        present |= {name: made.present[role] for role, name in opened.computed.items()}
    return RowStore(values, present)


def _columns(features: Features, table: Table | None) -> Columns:
    return columns_of(features, held(table))


def _statistics(
    members: Sequence[OpenedMember],
    models: Sequence[PriceModel],
    store: RowStore,
    ids: pd.Index,
    world: World,
) -> tuple[EmbeddingStatistics, dict[str, float]]:
    """Computes statistics of the embeddings, for the guards.

    Returns:
        The statistics by source; those of a source come from the model of the first member that reads it. And how much
        pairs of sources agreed in the trainings of the members.
    """
    seen, found = EmbeddingStatistics(pd.DataFrame(), {}, {}), list[EmbeddingStatistics]()
    agreement = dict[str, float]()
    for opened, model in zip(members, models, strict=True):
        checked = compared(view_of(store, opened))
        names = _names(opened, checked)
        new = {role: name for role, name in names.items() if name not in seen.shift}
        if not new:
            continue
        one = statistics_of(model, checked, ids, world)
        found.append(replace(one, prints=one.prints[list(new)].rename(columns=new)))
        seen.shift.update({name: one.shift[role] for role, name in new.items()})
        seen.spread.update({name: one.spread[role] for role, name in new.items()})
        agreement |= _agreement(opened, names)
    return replace(seen, prints=pd.concat([one.prints for one in found], axis=1)), agreement


def _names(opened: OpenedMember, store: RowStore) -> dict[str, str]:
    """Returns, for each role, a name that members share: that of its source, or the role itself if it is computed."""
    return {role: opened.bindings.get(role, role) for role in store.values}


def _agreement(opened: OpenedMember, names: Mapping[str, str]) -> dict[str, float]:
    """Returns the agreement that the member's training measured, for pairs of sources in either order.

    Args:
        names: as of `_names`; pairs with other roles are left out.
    """
    found: dict[str, float] = {}
    for pair, value in opened.chosen.manifest.agreement.items():
        first, second = pair.split(" ")
        if first in names and second in names:
            found[f"{names[first]} {names[second]}"] = value
            found[f"{names[second]} {names[first]}"] = value
    return found


def weighted_mean_of(
    members: Sequence[OpenedMember], models: Sequence[PriceModel], positions: Sequence[Tensor]
) -> Compute:
    """Returns the function that computes the outputs of the ensemble.

    These are "price" [B] in dollars, "spread" [B] if all members have one, and the comparable products as of `merged`.

    Args:
        positions: as of `positions_among`.
    """
    weights = [opened.member.weight for opened in members]
    computes = [pricing(model) for model in models]

    def compute_all(batch: Batch) -> dict[str, Tensor]:
        outputs = [
            compute(Batch(_by_role(batch.inputs, opened), _by_role(batch.present, opened)))
            for opened, compute in zip(members, computes, strict=True)
        ]
        mixed = {"price": torch.exp(_mean(weights, [torch.log(output["price"].double()) for output in outputs]))}
        if all("spread" in output for output in outputs):
            mixed["spread"] = _mean(weights, [output["spread"].double() for output in outputs])
        mixed |= merged(outputs, weights, positions)
        return mixed

    return compute_all


def _mean(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Returns the weighted mean [B] of the members' values, each [B]; the weights have a sum of 1."""
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), torch.zeros_like(values[0]))
