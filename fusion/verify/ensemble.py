"""Checks of an ensemble: its files, its figures, and that the runs that it is made of still exist."""

from __future__ import annotations

import io
import math

import numpy as np

from fusion import storage
from fusion.metrics import compute_smape
from fusion.records.manifests import ENSEMBLE, INTERVALS, MANIFEST, MODEL, PULLED, VALIDATION, Folder
from fusion.records.output import OutputFolder
from fusion.records.run import FACTS, RunFolder
from fusion.records.schemas import (
    ENSEMBLE_VARIANT,
    CheckpointManifest,
    EnsembleMember,
    EnsembleRecord,
    Manifest,
    RunFacts,
)
from fusion.verify.checkpoint import check_intervals
from fusion.verify.findings import Report, check_files, check_once, first_line, parsed, read
from fusion.verify.page import check_run_pages

# Relative. Fitted weights are rounded, so that they add up to 1 only about; sums of float64 depend on their order.
TOLERANCE = 1e-6


def is_ensemble(folder: Folder, manifest: bytes | None) -> bool:
    """Whether the folder is that of an ensemble, committed or not: `ensemble.json` is written first, the manifest last.

    Args:
        manifest: content of the folder's manifest; None if it has none.
    """
    return (manifest is not None and ENSEMBLE.encode() in manifest) or storage.exists(folder.at(ENSEMBLE))


def check_ensemble(report: Report, folder: RunFolder) -> None:
    """Checks the folder of an ensemble, and that each member still has the model that the ensemble was made with."""
    if not folder.is_committed():
        report.note(f"{folder.name}: not committed, so it does not count")
        return
    manifest, contents = check_files(report, folder, Manifest, {ENSEMBLE, FACTS, VALIDATION})
    record = parsed(report, ENSEMBLE, contents.get(ENSEMBLE), EnsembleRecord)
    facts = parsed(report, FACTS, contents.get(FACTS), RunFacts)
    if manifest is None or record is None or facts is None:
        return
    if folder.is_in_runs:
        report.expect(f"{ENSEMBLE}: run_id", folder.name, record.run_id)
    report.expect("run.json: run_id", record.run_id, facts.run_id)
    report.expect("run.json: variant", ENSEMBLE_VARIANT, facts.variant)
    report.expect("run.json: config_sha256 of the members", record.model_sha256(), facts.config_sha256)
    total = sum(member.weight for member in record.members)
    if not math.isclose(total, 1, rel_tol=TOLERANCE):
        report.bad(f"{ENSEMBLE}: sum of the weights", 1, total)
    for member in record.members:
        _check_member(report, folder, member)
    if VALIDATION in contents:
        _check_validation(report, record, contents[VALIDATION])
    if INTERVALS in contents:
        check_intervals(report, INTERVALS, contents[INTERVALS], contents.get(VALIDATION))
    check_run_pages(report, folder, record.run_id)


def _check_member(report: Report, folder: RunFolder, member: EnsembleMember) -> None:
    """Compares a member with its run. In a copy of the ensemble alone, runs are missing, which is only noted."""
    what = f"member {member.run}: model_sha256 of {member.checkpoint}"
    run = RunFolder(OutputFolder(folder.output).at(member.run)) if folder.output else None
    content = read(run.checkpoint(member.checkpoint).manifest_url) if run else None
    if content is None and (run is None or storage.exists(folder.at(PULLED))):
        report.note(f"member {member.run}: its run is not in this copy, so it was not compared")
    elif content is None:
        report.bad(what, "a checkpoint", "no such checkpoint, and the ensemble cannot predict without it")
    else:
        made = parsed(report, f"member {member.run}: {member.checkpoint}/{MANIFEST}", content, CheckpointManifest)
        if made is not None:
            report.expect(what, made.sha256_of(MODEL), member.model_sha256)


def _check_validation(report: Report, record: EnsembleRecord, content: bytes) -> None:
    """Compares the validation rows of the ensemble with the figures in `ensemble.json`."""
    import pandas as pd
    from pyarrow import ArrowException

    from fusion.data.tables import Table

    try:
        rows = pd.read_parquet(io.BytesIO(content)).astype({"sample_id": "str"}).set_index("sample_id")
        smape = compute_smape(rows["price"], rows["predicted"])
        n_groups = rows["group"].nunique()
    except (ArrowException, ValueError, TypeError, OSError, KeyError) as error:
        report.bad(VALIDATION, "Parquet with sample_id, price, predicted and group", first_line(error))
        return
    check_once(report, f"{VALIDATION}: ids", list(rows.index))
    report.expect(f"{VALIDATION}: rows", record.rows, len(rows))
    report.expect(f"{VALIDATION}: groups", record.groups, n_groups)
    digest = Table(rows[["price"]], np.arange(len(rows))).digest()
    report.expect(f"{VALIDATION}: rows_sha256", record.rows_sha256, digest)
    if not math.isclose(smape, record.smape, rel_tol=TOLERANCE):
        report.bad(f"{ENSEMBLE}: smape, recomputed", smape, record.smape)
