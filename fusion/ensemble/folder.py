"""The folder of an ensemble, `runs/<id>/`: `ensemble.json`, validation predictions, intervals, and a manifest.

It is among the folders of runs, because an ensemble is compared and served like a run. It has no checkpoint: its
`ensemble.json` names the checkpoints of its members, which stay in their own folders. The manifest is written last; an
ensemble without it does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from fusion import log, storage
from fusion.compare.out_of_fold import Member, Scored, Shared
from fusion.config import digest
from fusion.data.tables import Table
from fusion.ensemble.weights import Blend
from fusion.errors import ConfigError
from fusion.records import best_run, intervals, manifests, schemas
from fusion.records.manifests import ENSEMBLE, INTERVALS, VALIDATION
from fusion.records.provenance import revision
from fusion.records.run import CONFIG, FACTS, RunFolder
from fusion.records.schemas import (
    ENSEMBLE_VARIANT,
    SCHEMA,
    EnsembleMember,
    EnsembleRecord,
    Manifest,
    RunFacts,
    RunPointer,
    seal,
)
from fusion.records.validation import to_parquet


def record_of(run_id: str, found: Sequence[Scored], rows: Shared, blend: Blend) -> EnsembleRecord:
    """Returns the content of `ensemble.json`.

    The fold runs of one recipe share its weight equally. Runs with a weight of 0 are left out.

    Args:
        run_id: name of the ensemble; empty: a name is made from the members and weights.
    """
    members = [
        EnsembleMember(
            member.variant,
            f"runs/{member.run_id}",
            member.checkpoint,
            member.model_sha256,
            float(weight) / len(one.members),
        )
        for one, weight in zip(found, blend.weights, strict=True)
        for member in one.members
        if weight > 0
    ]
    default_id = f"ensemble-{digest([[one.model_sha256, one.weight] for one in members])[:8]}"
    equal_smape = blend.smape.mean + (blend.gain.mean if blend.fitted else 0)
    return EnsembleRecord(
        run_id or default_id,
        members,
        blend.fitted,
        blend.smape.mean,
        blend.smape.error,
        equal_smape,
        min(one.mean for one in blend.members),
        len(rows),
        len(np.unique(rows.groups)),
        rows_digest(rows.ids, rows.prices),
        str(found[0].members[0].settings["data"]),
    )


def rows_digest(ids: pd.Index, prices: np.ndarray) -> str:
    """Returns a sha256 of validation rows: their ids [n] and prices [n]."""
    return Table(pd.DataFrame({"price": prices}, index=ids), np.arange(len(ids))).digest()


def publish(output: str, record: EnsembleRecord, found: Sequence[Scored], rows: Shared, blend: Blend) -> bool:
    """Writes the folder of the ensemble, unless it exists. Returns whether this call has written it.

    Raises:
        ConfigError: there is a run of that name, or a different ensemble.
    """
    folder = RunFolder.named(output, record.run_id)
    if storage.exists(folder.at(CONFIG)):
        raise ConfigError(f"{record.run_id} is the name of a run in {output}", "choose another --run-id")
    if folder.is_committed():
        _check_same(folder, record)
        return False
    members = [member for one in found for member in one.members]
    frame, by = _frame(rows, blend, members)
    frame = frame.assign(**_spread(found, rows, blend))
    made = intervals.fit(frame, by)
    files = {
        ENSEMBLE: seal(asdict(record)),  # comes first, because it shows that the folder is not that of a run
        FACTS: seal(schemas.written(_facts(record, members))),
        VALIDATION: to_parquet(frame.assign(group=rows.groups)),
        **({} if made is None else {INTERVALS: seal(asdict(made))}),
    }
    manifest = seal(asdict(Manifest(SCHEMA, manifests.write_files(folder, files))))
    if storage.create(folder.manifest_url, manifest):
        return True
    _check_same(folder, record)  # another process has written the manifest in the meantime
    return False


def _frame(rows: Shared, blend: Blend, members: Sequence[Member]) -> tuple[pd.DataFrame, str]:
    """Returns the rows that intervals are fitted on, and the name of the column that intervals are grouped by.

    The name is empty, and the rows have no category, if the members do not all use the same column.
    """
    frame = pd.DataFrame({"sample_id": rows.ids, "price": rows.prices, "predicted": np.exp(blend.log_prices)})
    names = {str(member.settings.get("interval_by") or intervals.CATEGORY) for member in members}
    if rows.category is None or len(names) > 1:
        return frame, ""
    return frame.assign(category=rows.category.to_numpy()), names.pop()


def _spread(found: Sequence[Scored], rows: Shared, blend: Blend) -> dict[str, np.ndarray]:
    """Returns {"spread": [n]}, the weighted mean of the members' spreads.

    The result is empty if a member has no spread and its weight is not 0.
    """
    used = [(one.rows, weight) for one, weight in zip(found, blend.weights, strict=True) if weight > 0]
    if not all("spread" in known and known["spread"].notna().all() for known, _ in used):
        return {}
    return {"spread": np.sum([weight * known["spread"].loc[rows.ids].to_numpy() for known, weight in used], axis=0)}


def _check_same(folder: RunFolder, record: EnsembleRecord) -> None:
    """Raises ConfigError if the ensemble in the folder is not the one of the record."""
    if folder.ensemble() != record:
        raise ConfigError(
            f"the ensemble {record.run_id} exists with other members, weights or rows", "choose another --run-id"
        )


def _facts(record: EnsembleRecord, members: Sequence[Member]) -> RunFacts:
    """Returns the content of `run.json`, with the facts that pointers and the guards of later predictions read."""
    first = schemas.read_required(RunFacts, members[0].run.at(FACTS))
    return RunFacts(
        run_id=record.run_id,
        variant=ENSEMBLE_VARIANT,
        config_sha256=record.model_sha256(),
        data_sha256=digest([member.data_sha256 for member in members]),
        dims=dict(first.dims),
        price_quartiles=first.price_quartiles,
        revision=revision(),
        started=schemas.now(),
    )


def point_to(output: str, record: EnsembleRecord, *, promote: bool) -> None:
    """Moves the pointers to this ensemble: `latest`, and `best` by the same rules as for runs."""
    target = RunPointer(record.run_id, ENSEMBLE, record.smape, record.rows_sha256, record.model_sha256())
    best_run.point_to(output, ENSEMBLE_VARIANT, target, promote=promote)
    log.info(event="ensemble", folder=RunFolder.named(output, record.run_id), smape=record.smape)
