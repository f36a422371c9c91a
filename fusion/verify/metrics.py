"""Checks of `metrics/` in a run: the metrics by group that an evaluation wrote, and the result of an ablation."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusion import storage
from fusion.metrics import compute_smape
from fusion.records.manifests import ABLATION, EPOCHS, LINES, MANIFEST, MODEL
from fusion.records.run import RunFolder
from fusion.records.schemas import AblationRecord, CheckpointManifest, MetricsManifest, RunFacts
from fusion.verify.findings import Report, check_comparables, check_files, first_line, parsed, read, some

if TYPE_CHECKING:
    import pandas as pd

FILES = {"groups.csv", "groups.parquet", "summary.json", "predictions.parquet"}
# Relative. summary.json has ten decimals, so that a SMAPE as small as 0.01% has a relative error below this.
TOLERANCE = 1e-6


def check_metrics(
    report: Report,
    run: RunFolder,
    facts: RunFacts | None,
    checkpoints: Mapping[str, CheckpointManifest],
    validating: set[str] | None,
) -> None:
    """Checks that the metrics are not damaged, and belong to this run's data, model and validation rows.

    If another evaluation replaces the files during the check, only a note is added.

    Args:
        facts: `run.json` of the run; None if it is missing or damaged.
        checkpoints: manifests of the run's checkpoints, by name.
        validating: ids of the validation rows; None if unknown.
    """
    folder, part = run.metrics, Report(prefix=report.prefix)
    before = read(folder.manifest_url)
    if before is None:
        _check_unfinished(report, run)
        return
    manifest, contents = check_files(part, folder, MetricsManifest, FILES)
    if manifest is not None:
        _check_lineage(part, run, manifest, facts, checkpoints)
    if manifest is not None and not part.n_wrong:
        _check_content(part, manifest, contents, validating)
    if part.n_wrong and read(folder.manifest_url) != before:
        report.note("metrics: another evaluation replaced them while they were read")
    else:
        report.add(*part.findings)


def check_ablation(
    report: Report, run: RunFolder, facts: RunFacts | None, checkpoints: Mapping[str, CheckpointManifest]
) -> None:
    """Checks `ablation.json`, if it exists: it belongs to this run, and its Shapley values add up.

    By definition, the Shapley values of all sources add up to the SMAPE without sources minus that with all of them.
    """
    content = read(run.at("metrics", ABLATION))
    if content is None:
        return
    record = parsed(report, f"metrics/{ABLATION}", content, AblationRecord)
    if record is None:
        return
    if facts is not None:
        report.expect(f"metrics/{ABLATION}: run_id of run.json", facts.run_id, record.run_id)
        report.expect(f"metrics/{ABLATION}: data_sha256 of run.json", facts.data_sha256, record.data_sha256)
    made = checkpoints.get(record.checkpoint)
    if made is not None:
        report.expect(f"metrics/{ABLATION}: model_sha256", made.sha256_of(MODEL), record.model_sha256)
    worth, total = record.nothing - record.everything, sum(one.shapley.mean for one in record.sources)
    if not math.isclose(worth, total, abs_tol=1e-4):  # each is rounded to 1e-6, and there are fewer than 100 sources
        report.bad(f"metrics/{ABLATION}: sum of the Shapley values", worth, total)


def _check_unfinished(report: Report, run: RunFolder) -> None:
    """Reports files of metrics without a manifest.

    An evaluation that still runs, or was killed, leaves such files, and then also has chunks in `parts/`: only a note.
    Without the chunks the manifest was lost.
    """
    names = {file.name for file in run.ls("metrics")} - {LINES, EPOCHS, ABLATION}
    if names and storage.ls(run.parts):
        report.note("metrics: an evaluation has not completed; if it is not running, run it again")
    elif names & FILES:
        report.bad(f"metrics/{MANIFEST}", f"one beside {some(list(names))}", "no such file")


def _check_lineage(
    report: Report,
    run: RunFolder,
    manifest: MetricsManifest,
    facts: RunFacts | None,
    checkpoints: Mapping[str, CheckpointManifest],
) -> None:
    """Compares the digests in the manifest of the metrics with the run and the evaluated checkpoint."""
    if facts is not None and manifest.run_id:  # earlier versions did not say
        report.expect("metrics: run_id of run.json", facts.run_id, manifest.run_id)
        report.expect("metrics: data_sha256 of run.json", facts.data_sha256, manifest.data_sha256)
    name, made = manifest.checkpoint, checkpoints.get(manifest.checkpoint)
    if made is not None and made.sha256_of(MODEL) and manifest.model_sha256:
        report.expect(f"metrics: model_sha256 of {name}", made.sha256_of(MODEL), manifest.model_sha256)
    elif made is None and name < max(checkpoints, default=""):
        report.note(f"metrics: they are of {name}, which was removed since; run the evaluation again")
    elif made is None and not run.checkpoint(name).is_committed():
        report.bad("metrics: checkpoint", some(list(checkpoints)), name)


def _check_content(
    report: Report, manifest: MetricsManifest, contents: Mapping[str, bytes], validating: set[str] | None
) -> None:
    """Recomputes the figures that can be recomputed from the predictions."""
    import pandas as pd
    from pyarrow import ArrowException

    try:
        summary: dict[str, Any] = json.loads(contents["summary.json"])
        groups = pd.read_parquet(io.BytesIO(contents["groups.parquet"]))
        rows = pd.read_parquet(io.BytesIO(contents["predictions.parquet"]))
        smape, stated = compute_smape(rows["price"], rows["predicted"]), float(summary["smape"])
        ids = set(rows["sample_id"].astype("str"))
        report.expect("metrics/summary.json: checkpoint", manifest.checkpoint, summary["checkpoint"])
        report.expect("metrics/summary.json: count", len(rows), summary["count"])
    except (ArrowException, ValueError, TypeError, OSError, KeyError) as error:
        report.bad("metrics", "summary.json, groups.parquet and predictions.parquet", first_line(error))
        return
    if not math.isclose(smape, stated, rel_tol=TOLERANCE):
        report.bad("metrics/summary.json: smape, recomputed", smape, stated)
    _check_coverage(report, rows, summary)
    check_comparables(report, "metrics/predictions.parquet", rows)
    if groups.to_csv(index=False).encode() != contents["groups.csv"]:
        report.bad("metrics/groups.csv", "the rows of groups.parquet", "other rows")
    if validating is not None and validating != ids:
        others = some(list(validating ^ ids))
        report.bad("metrics/predictions.parquet", "the validation rows of the split", f"others: {others}")


def _check_coverage(report: Report, rows: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    """Recomputes the share of prices within their bounds, and checks the order of the bounds."""
    from fusion.records.intervals import is_within, misplaced

    covered = {name: value for name, value in summary.items() if name.startswith("covered_")}
    try:
        found = {name: float(is_within(rows, int(name.removeprefix("covered_"))).mean()) for name in covered}
        n_wrong = misplaced(rows, "predicted") if covered else 0
    except (KeyError, ValueError) as error:
        report.bad("metrics/predictions.parquet", "the bounds of its intervals", first_line(error))
        return
    for name, share in found.items():
        if not math.isclose(share, float(covered[name]), rel_tol=TOLERANCE):
            report.bad(f"metrics/summary.json: {name}, recomputed", share, covered[name])
    if n_wrong:
        report.bad("metrics/predictions.parquet", "finite bounds around the predicted price", f"{n_wrong} other rows")
