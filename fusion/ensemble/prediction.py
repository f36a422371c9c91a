"""Prices of an ensemble: each member's model prices every row, and the mean of their logs is what is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from fusion import log, storage
from fusion.command.settings import from_json
from fusion.config import PredictConfig, RunConfig, digest
from fusion.data.embeddings import load
from fusion.data.inputs import Inputs, find_inputs, find_table, table_sha256
from fusion.data.row_store import RowStore
from fusion.data.tables import Table, read_table
from fusion.distributed.world import World, held, join_world
from fusion.ensemble.comparables import all_named, merged, places_among
from fusion.errors import ConfigError, DataError, DivergedError, UnreachableError
from fusion.features.fitted import Features, columns_of
from fusion.features.rows import compared, with_features
from fusion.nn.batch import Batch
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import check_dims, features_of, load_model, named, parts_folder, pricing, publish_prices
from fusion.prediction.resumable import Compute, compute_parts, discard
from fusion.records import find_run, schemas
from fusion.records.best_run import pointed_to
from fusion.records.manifests import ENSEMBLE, INTERVALS, Checkpoint
from fusion.records.provenance import ENSEMBLE_CODE, code_digest
from fusion.records.run import CONFIG, RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT, EnsembleMember, EnsembleRecord, Intervals
from fusion.submissions import guards, submission
from fusion.submissions.fingerprints import Look, look
from fusion.submissions.unchanged import republish
from fusion.variants import config_class_of, network_of


@dataclass(frozen=True)
class Part:
    """A member: the checkpoint that it is, with the settings that it was trained with, and what it computes of rows."""

    member: EnsembleMember
    chosen: Checkpoint
    config: RunConfig
    features: Features | None

    @property
    def bindings(self) -> dict[str, str]:
        return self.config.bindings()

    @property
    def computed(self) -> dict[str, str]:
        """Computed role to its name among those of all members: fold runs have fitted it on other rows."""
        digest = self.chosen.manifest.features_sha256[:12]
        return {role: f"{role} {digest}" for role in self.features.dims} if self.features else {}


def predict_test(settings: PredictConfig) -> None:
    """As `fusion.prediction.predict.predict_test`, with an ensemble.

    Raises:
        DataError: no such ensemble, a member that is gone or another, and as there.
        UnreachableError, StopRequested: as there.
    """
    with join_world(settings.device) as world:
        settings = replace(settings, date=world.on_main(settings.day))
        if world.on_main(lambda: republish(settings, ENSEMBLE_VARIANT, ENSEMBLE_CODE)):
            return
        folder, record, parts = world.on_main(lambda: _open(settings))
        log.configure(record.run_id, world.rank, world.size)
        data = world.on_main(lambda: find_run.data_of(settings, record.data))
        inputs = world.on_main(lambda: find_inputs(data, "test", _sources(parts)))
        origin = world.on_main(lambda: _origin(folder, record, parts, data, inputs))
        under_way = storage.join(settings.output, "parts", settings.name)
        if world.on_main(lambda: submission.reuse(settings, origin)):
            world.on_main(lambda: discard(under_way))
            return
        limits = world.on_main_alone(lambda: _intervals(folder))
        _predict(settings, record, parts, inputs, origin, limits, world)
        world.on_main(lambda: discard(under_way))


def _open(settings: PredictConfig) -> tuple[RunFolder, EnsembleRecord, list[Part]]:
    """The ensemble to use: `--run-dir`, else `--run-id`, else the one that is served; and its members, checked."""
    folder = _find(settings)
    record = folder.ensemble()
    output = folder.url.rpartition("/runs/")[0]
    return folder, record, [_open_member(output, record, member) for member in record.members]


def _find(settings: PredictConfig) -> RunFolder:
    makes = f"`python -m fusion.ensemble RUN RUN --output {settings.output}` makes one"
    if settings.run_dir:
        folder = RunFolder(settings.run_dir.rstrip("/"))
    elif settings.run_id:
        folder = RunFolder.named(settings.output, settings.run_id)
    else:
        best = pointed_to(settings.output, ENSEMBLE_VARIANT)
        if best is None:
            raise DataError(f"no ensemble under {settings.output}", makes)
        folder = RunFolder.named(settings.output, best.run_id)
    if storage.exists(folder.at(ENSEMBLE)):
        return folder
    facts = folder.facts_if_whole()
    if facts is not None and facts.variant != ENSEMBLE_VARIANT:
        raise ConfigError(
            f"run {folder.run_id} is of {facts.variant}, and this command predicts with ensembles",
            f"use python -m fusion.{facts.variant}.predict_test",
        )
    raise DataError(f"no ensemble {folder.run_id} under {settings.output}", makes)


def _open_member(output: str, record: EnsembleRecord, member: EnsembleMember) -> Part:
    run = RunFolder(storage.join(output, member.run))
    found = {made.name: made for made in run.checkpoints()}
    chosen = found.get(member.checkpoint)
    if chosen is None or chosen.model_sha256 != member.model_sha256:
        state = "gone" if chosen is None else "another model now"
        raise DataError(
            f"the ensemble {record.run_id} needs {member.checkpoint} of {member.run}, which is {state}",
            "restore that run, or make an ensemble of the runs that are left with python -m fusion.ensemble",
        )
    url = run.at(CONFIG)
    config = from_json(config_class_of(member.variant), storage.read(url), url)
    return Part(member, chosen, config, features_of(run, config, chosen))


def _sources(parts: Sequence[Part]) -> dict[str, str]:
    """All sources that any member reads, by their own names: roles differ between variants."""
    return {name: name for part in parts for name in part.bindings.values()}


def _origin(
    folder: RunFolder, record: EnsembleRecord, parts: Sequence[Part], data: str, inputs: Inputs
) -> submission.Origin:
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
        _sources(parts),
        inputs.version(),
        "" if limits is None else storage.sha256(limits),
    )


def _intervals(folder: RunFolder) -> Intervals | None:
    content = folder.ensemble_file(INTERVALS)
    return None if content is None else schemas.parse(Intervals, content, folder.at(INTERVALS))


def _predict(
    settings: PredictConfig,
    record: EnsembleRecord,
    parts: Sequence[Part],
    inputs: Inputs,
    origin: submission.Origin,
    limits: Intervals | None,
    world: World,
) -> None:
    """Reads, judges, prices and publishes the rows."""
    data = origin.data
    models = [load_model(part.chosen, part.config, network_of(part.member.variant), world) for part in parts]
    computed_of = [name for part in parts if part.features for name in part.features.names]
    columns = {"price", *([limits.by] if limits else []), *computed_of}
    table = world.on_main_alone(lambda: read_table(data, "test", priced=False, columns=columns))
    ids = world.on_main(lambda: held(table).ids)
    most = min(part.config.max_missing for part in parts) if settings.max_missing is None else settings.max_missing
    store = load(data, "test", _sources(parts), ids, world, max_missing=most, sources=inputs.sources)
    store = _with_computed(store, parts, table, world)
    for part, model in zip(parts, models, strict=True):
        check_dims(_view(store, part).dims, model.dims, f"{data}/embeddings/test")
    if world.on_main(lambda: find_table(data, "test")) != inputs.table:
        raise UnreachableError(
            f"{inputs.table[0].url} was written while it was read", "run it again once it is complete"
        )
    store, last = store.resident_on(world.device), world.on_main_alone(lambda: submission.last(settings))
    seen, agreement = _look(parts, models, store, ids, world)
    about = guards.about_embeddings(seen, agreement, last, origin)
    world.on_main(lambda: guards.conclude(settings, about))
    under_way = storage.join(settings.output, "parts", settings.name)
    known = all_named(models)
    mixing = _mixing(parts, models, places_among(known, models, world.device))
    computed = named(compute_parts(mixing, store, world, parts_folder(under_way, origin, world)), known)
    try:
        world.on_main(lambda: publish_prices(settings, origin, record.smape, held(table), computed, limits, seen, last))
    except (DataError, DivergedError):
        world.on_main(lambda: discard(under_way))
        raise


def _view(store: RowStore, part: Part) -> RowStore:
    """The store's rows as the member knows them: by role."""
    return RowStore(_by_role(store.values, part), _by_role(store.present, part), tuple(part.computed))


def _by_role(by_name: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    return {role: by_name[name] for role, name in {**part.bindings, **part.computed}.items()}


def _with_computed(store: RowStore, parts: Sequence[Part], table: Table | None, world: World) -> RowStore:
    """The store with what each member computes of the table; members that compute the same share it."""
    values, present = dict(store.values), dict(store.present)
    for part in parts:
        if part.features is None or set(part.computed.values()) <= values.keys():
            continue
        features = part.features
        columns = world.on_main_alone(lambda features=features: columns_of(features, held(table)))  # type: ignore[misc]
        made = with_features(store, features, columns, "test.csv", world)
        values |= {name: made.values[role] for role, name in part.computed.items()}
        present |= {name: made.present[role] for role, name in part.computed.items()}
    return RowStore(values, present)


def _look(
    parts: Sequence[Part], models: Sequence[PriceModel], store: RowStore, ids: pd.Index, world: World
) -> tuple[Look, dict[str, float]]:
    """What embeddings look like, by source, to the first member that reads each, and how pairs agreed in training."""
    seen, agreement, found = Look(pd.DataFrame(), {}, {}), dict[str, float](), list[Look]()
    for part, model in zip(parts, models, strict=True):
        shown = compared(_view(store, part))
        names = {role: name for role, name in _shown(part, shown).items() if name not in seen.shift}
        if not names:
            continue
        one = look(model, shown, ids, world)
        found.append(replace(one, prints=one.prints[list(names)].rename(columns=names)))
        seen.shift.update({name: one.shift[role] for role, name in names.items()})
        seen.spread.update({name: one.spread[role] for role, name in names.items()})
        agreement |= _agreement(part, _shown(part, shown))
    return replace(seen, prints=pd.concat([one.prints for one in found], axis=1)), agreement


def _shown(part: Part, store: RowStore) -> dict[str, str]:
    """Role to what it is called where the roles of all members stand together: its source, if it has one."""
    return {role: part.bindings.get(role, role) for role in store.values}


def _agreement(part: Part, names: Mapping[str, str]) -> dict[str, float]:
    """Of pairs of sources, in either order."""
    pairs = {tuple(pair.split(" ")): value for pair, value in part.chosen.manifest.agreement.items()}
    both = [(names[one], names[other], value) for (one, other), value in pairs.items() if {one, other} <= names.keys()]
    return {f"{first} {second}": value for a, b, value in both for first, second in ((a, b), (b, a))}


def _mixing(parts: Sequence[Part], models: Sequence[PriceModel], places: Sequence[Tensor]) -> Compute:
    """What computes {"price": [B] dollars} and, where all members have one, "spread" [B], their weighted means.

    And the comparable products of members that name some, with rows among those of all members.

    Args:
        places: of each member's rows there.
    """
    weights = [part.member.weight for part in parts]
    computes = [pricing(model) for model in models]

    def compute(batch: Batch) -> dict[str, Tensor]:
        found = [
            priced(Batch(_by_role(batch.inputs, part), _by_role(batch.present, part)))
            for part, priced in zip(parts, computes, strict=True)
        ]
        mixed = {"price": torch.exp(_mean(parts, [torch.log(one["price"].double()) for one in found]))}
        if all("spread" in one for one in found):
            mixed["spread"] = _mean(parts, [one["spread"].double() for one in found])
        mixed |= merged(found, weights, places)
        return mixed

    return compute


def _mean(parts: Sequence[Part], values: Sequence[Tensor]) -> Tensor:
    """[B] from values [B] of each member, by their weights."""
    return sum((part.member.weight * one for part, one in zip(parts, values, strict=True)), torch.zeros_like(values[0]))
