"""Predicts a run's validation rows with every set of its sources, and computes what each source is worth.

The sources that are not in a set are marked missing, as in a row that lacks them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusion import log, storage
from fusion.ablation.shapley import Coalitions, coalitions
from fusion.ablation.tables import show
from fusion.compare.standard_errors import Estimate, IntArray, clustered_mean
from fusion.config import AblateConfig, RunConfig
from fusion.data.tables import Table
from fusion.distributed.world import World, held, join_world
from fusion.errors import DataError
from fusion.evaluation.rows import read_validation
from fusion.metrics import FloatArray, row_smape
from fusion.nn.batch import Batch
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import load_model, open_run, parts_folder, pricing
from fusion.prediction.resumable import Compute, compute_parts, discard
from fusion.records import manifests
from fusion.records.find_run import no_run
from fusion.records.manifests import ABLATION
from fusion.records.run import RunFolder
from fusion.records.schemas import AblationRecord, Effect, SourceWorth, seal
from fusion.records.split import read_split
from fusion.report.publish import try_report
from fusion.submissions import submission
from fusion.variants import config_class_of, network_of

DIGITS = 6  # decimals of a SMAPE in percent; further ones would be rounding errors
COMPUTED = "train.csv"  # stands in place of a source for roles that are computed from the table


@dataclass(frozen=True)
class Priced:
    """The errors of the n validation rows with each of C sets of sources.

    Attributes:
        roles: the sources, by role, in the order of the bits of a set.
        errors: [n, C] SMAPE in percent of each row with each set.
        groups: [n] groups of near-duplicates.
        as_trained: as in `fusion.evaluation.evaluate.is_as_trained`.
    """

    roles: list[str]
    sets: Coalitions
    errors: FloatArray
    groups: IntArray
    as_trained: bool | None


def ablate(settings: AblateConfig) -> None:
    """Computes what each source is worth to a run, writes `metrics/ablation.json`, and prints it.

    Raises:
        DataError: as in `evaluate_by_groups`.
        StopRequested: a signal asked to stop; the parts that are done are saved.
    """
    with join_world(settings.device) as world:
        variant = world.on_main(lambda: _variant(settings))
        config_class, build = config_class_of(variant), network_of(variant)
        run, config, chosen, data = open_run(settings, config_class, world)
        model = load_model(chosen, config, build, world)
        priced = _price(settings, run, config, chosen, model, data, world)

        def finish() -> None:
            record = _record(run, config, chosen, held(priced))
            storage.write(run.at("metrics", ABLATION), seal(asdict(record)))
            show(record)

        world.on_main(finish)
        world.on_main(lambda: discard(run.parts))
        world.on_main(lambda: try_report(run))


def _variant(settings: AblateConfig) -> str:
    """Returns the variant of the run that the settings name, from its `run.json`."""
    named = RunFolder.named(settings.output, settings.run_id or "")
    run = RunFolder(settings.run_dir.rstrip("/")) if settings.run_dir else named
    if variant := run.variant():
        return variant
    if settings.run_dir:
        raise DataError(f"{run} has no run.json: it is not the folder of a run", "give a run's folder with --run-dir")
    raise no_run(settings.output, settings.run_id or "")


def _price(
    settings: AblateConfig,
    run: RunFolder,
    config: RunConfig,
    chosen: manifests.Checkpoint,
    model: PriceModel,
    data: str,
    world: World,
) -> Priced | None:
    """Computes the errors of the validation rows with every set of sources; returns them on rank 0, None elsewhere."""
    origin = world.on_main(lambda: submission.origin_of(run, chosen, config, data, "train"))
    table, store, as_trained = read_validation(settings, run, config, chosen, model, data, world)
    sets = coalitions(len(store.dims))
    log.info(event="ablating", rows=len(store), sets=len(sets.sets))
    parts = parts_folder(run.parts, origin, world) + "-ablation"
    store = store.resident_on(world.device, settings.residency)
    computed = compute_parts(_hiding(model, sets), store, world, parts)
    if not world.is_main:
        return None
    prices = held(table).prices
    errors = np.stack([row_smape(prices, priced) for priced in computed["price"].T], axis=1)
    return Priced(list(store.present), sets, errors, _groups(run, chosen, held(table)), as_trained)


def _hiding(model: PriceModel, sets: Coalitions) -> Compute:
    """Returns the function that computes {"price": [B, C]}: the price in dollars of each row with each set."""
    compute = pricing(model)

    def compute_all(batch: Batch) -> dict[str, Tensor]:
        return {"price": torch.stack([compute(_restricted(batch, one))["price"] for one in sets.sets], dim=1)}

    return compute_all


def _restricted(batch: Batch, coalition: int) -> Batch:
    """Returns the rows with all sources that are not in the set marked missing, and their vectors set to 0."""
    present = {
        role: is_present & bool(coalition >> number & 1)
        for number, (role, is_present) in enumerate(batch.present.items())
    }
    inputs = {role: torch.where(present[role].unsqueeze(1), values, 0.0) for role, values in batch.inputs.items()}
    return replace(batch, inputs=inputs, present=present)


def _groups(run: RunFolder, chosen: manifests.Checkpoint, table: Table) -> IntArray:
    """Returns the group of near-duplicates, [n], of each row of the table, from the run's split."""
    split = read_split(run, chosen.manifest.split_sha256).set_index("sample_id")
    found: pd.Series = split["group"].reindex(table.ids)
    return found.to_numpy(np.int64)


def _record(run: RunFolder, config: RunConfig, chosen: manifests.Checkpoint, priced: Priced) -> AblationRecord:
    means = priced.errors.mean(axis=0)
    names = [_name(coalition, priced.roles) for coalition in priced.sets.sets]
    sources = {role: config.bindings().get(role, COMPUTED) for role in priced.roles}
    return AblationRecord(
        run.run_id,
        chosen.name,
        chosen.model_sha256,
        chosen.manifest.data_sha256,
        priced.as_trained,
        len(priced.errors),
        len(np.unique(priced.groups)),
        _rounded(means[-1]),
        _rounded(means[0]),
        [_worth(priced, s, role, name) for s, (role, name) in enumerate(sources.items())],
        dict(zip(names, map(_rounded, means), strict=True)),
    )


def _name(coalition: int, roles: list[str]) -> str:
    """Returns the roles in a set, separated by spaces, or "none" for the empty set."""
    return " ".join(role for s, role in enumerate(roles) if coalition >> s & 1) or "none"


def _worth(priced: Priced, source: int, role: str, name: str) -> SourceWorth:
    """Returns what a source is worth; positive values mean that it lowers the SMAPE."""
    sets, errors = priced.sets, priced.errors
    alone = errors[:, sets.column(1 << source)]
    without = errors[:, sets.column(sets.everything ^ 1 << source)]
    lost = clustered_mean(without - errors[:, -1], priced.groups)  # the last set contains all sources
    shapley = clustered_mean(-(errors @ sets.shapley[source]), priced.groups)
    return SourceWorth(role, name, _rounded(alone.mean()), _rounded(without.mean()), _effect(lost), _effect(shapley))


def _effect(estimate: Estimate) -> Effect:
    bounds = (estimate.error, estimate.low, estimate.high)
    return Effect(_rounded(estimate.mean), *(None if value is None else _rounded(value) for value in bounds))


def _rounded(value: float) -> float:
    """Rounds, so that the file has no meaningless digits."""
    return round(float(value), DIGITS)
