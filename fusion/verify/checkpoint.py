"""Checks of one checkpoint: its files, the header of its weights, its validation predictions and its intervals."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from fusion.metrics import compute_smape
from fusion.records import manifests
from fusion.records.manifests import INTERVALS, MODEL, STATE, VALIDATION, Folder
from fusion.records.schemas import CheckpointManifest, Intervals, RunFacts
from fusion.verify.findings import Report, check_files, check_once, first_line, parsed, some

# Percentage points by which the coverage of all validation rows may fall below its level. Rows outside of the bins
# that are large enough use the intervals of a coarser bin, and those may cover fewer of them.
BORROWED = 5
TOLERANCE = 1e-9  # relative: another machine may add up the float64 numbers in another order


def check_checkpoint(
    report: Report,
    folder: Folder,
    left_out: Container[str] = (),
    facts: RunFacts | None = None,
    validating: set[str] | None = None,
) -> CheckpointManifest | None:
    """Checks a checkpoint's folder; returns its manifest, or None if that is missing or damaged.

    Args:
        left_out: names of files that a copy made by `jobs/pull.py` lacks; they are allowed to be missing.
        facts: `run.json` of its run; None if unknown.
        validating: ids of the validation rows of its run; None if unknown.
    """
    name = folder.name
    manifest, contents = check_files(report, folder, CheckpointManifest, {MODEL, STATE}, left_out)
    if manifest is not None and name.startswith("step-"):
        report.expect(f"{name}: step of the manifest", name, manifest.name)
    if MODEL in contents:
        _check_header(report, f"{name}/{MODEL}", contents[MODEL], facts.dims if facts else None)
    if manifest is not None and VALIDATION in contents:
        _check_validation(report, f"{name}/{VALIDATION}", contents[VALIDATION], manifest, validating)
    if INTERVALS in contents:
        check_intervals(report, f"{name}/{INTERVALS}", contents[INTERVALS], contents.get(VALIDATION))
    return manifest


def _check_header(report: Report, what: str, data: bytes, expected: Mapping[str, int] | None) -> None:
    """Checks that the weights can be parsed, and have the dimensions of `run.json`; None if those are unknown."""
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(data)  # type: ignore[no-untyped-call]
        dims = manifests.dims_in(data)
    except (SafetensorError, ValueError) as error:
        report.bad(f"{what}: header", "tensors, and in its metadata the dims of every role", first_line(error))
        return
    found = f"dims {', '.join(f'{role} {dim}' for role, dim in dims.items())}"
    if expected is None or dict(expected) == dims:
        report.ok(f"{what}: {len(tensors)} tensors, {found}")
    else:
        report.bad(f"{what}: dims of run.json", ", ".join(f"{role} {dim}" for role, dim in expected.items()), found)


def _check_validation(
    report: Report, what: str, data: bytes, manifest: CheckpointManifest, validating: set[str] | None
) -> None:
    """Checks ids and prices, and recomputes the SMAPE that the manifest states."""
    from fusion.records.validation import from_parquet

    try:
        rows = from_parquet(data)
    except ValueError as error:
        report.bad(what, "Parquet with sample_id, price and predicted", first_line(error))
        return
    ids = rows["sample_id"].tolist()
    check_once(report, f"{what}: ids", ids)
    if validating is not None and validating != set(ids):
        report.bad(f"{what}: ids", "the validation rows of the split", f"others: {some(list(validating ^ set(ids)))}")
    if not (rows[["price", "predicted"]].gt(0) & rows[["price", "predicted"]].lt(math.inf)).all(axis=None):
        report.bad(what, "finite prices above 0", "other values")
        return
    smape = compute_smape(rows["price"], rows["predicted"])
    if manifest.smape is None or not math.isclose(smape, manifest.smape, rel_tol=TOLERANCE):
        report.bad(f"{what}: smape of the manifest, recomputed", smape, manifest.smape)
    else:
        report.ok(f"{what}: {len(rows)} rows, smape {smape}")


def check_intervals(report: Report, what: str, data: bytes, validation: bytes | None) -> None:
    """Checks that intervals cover the validation rows that they were fitted to.

    This holds for correctly fitted intervals, and does not repeat the fit, so that intervals of other versions pass.

    Args:
        what: name of the file, for the findings.
        data: content of `intervals.json`.
        validation: content of `validation.parquet`; None if it is unknown, and then only the format is checked.
    """
    from fusion.records.intervals import bounds, is_within
    from fusion.records.validation import from_parquet

    made = parsed(report, what, data, Intervals)
    if made is None or validation is None:
        return
    if not made.levels or any(len(one.widths) != len(made.levels) for one in made.bins):
        report.bad(what, "levels, and in each bin a width for each", f"{len(made.levels)} levels")
        return
    try:
        rows = from_parquet(validation)
        rows = rows.assign(**bounds(made, rows))
    except (ValueError, LookupError) as error:
        report.bad(what, f"intervals for the rows of {VALIDATION}", first_line(error))
        return
    report.expect(f"{what}: rows", len(rows), made.rows)
    for level in made.levels:
        share = 100 * is_within(rows, level).mean()
        if share < level - BORROWED:
            report.bad(what, f"{level}% of its rows within the bounds of {level}%", f"{share:.1f}%")
