"""Checks of pointers: each is in the place that it was written to, and what it names exists and matches it."""

from __future__ import annotations

from typing import TypeVar

from fusion.records.manifests import ENSEMBLE
from fusion.records.output import OutputFolder
from fusion.records.run import FACTS, RunFolder
from fusion.records.schemas import (
    CheckpointManifest,
    EnsembleRecord,
    PointerPath,
    RunFacts,
    RunPointer,
    SubmissionPointer,
    validated,
)
from fusion.verify.ensemble import check_ensemble
from fusion.verify.findings import Report, parsed, read, read_as
from fusion.verify.run import check_run
from fusion.verify.submission import check_submission

T = TypeVar("T")

POINTERS = "/pointers/"


def check_pointer(report: Report, url: str, data: str | None) -> None:
    """Checks a pointer, and the run, ensemble or submission that it names.

    Args:
        data: as for `verify`.
    """
    output, _, rest = url.rpartition(POINTERS)
    if rest.startswith("runs/"):
        pointer = check_run_pointer(report, url)
        if pointer is not None:
            run = RunFolder.named(output, pointer.run_id)
            if pointer.checkpoint == ENSEMBLE:
                check_ensemble(report, run)
            else:
                check_run(report, run)
    else:
        target = check_submission_pointer(report, url)
        if target is not None:
            check_submission(report, OutputFolder(output).submission(target.submission), data)


def check_run_pointer(report: Report, url: str) -> RunPointer | None:
    """Checks a pointer to a run or an ensemble, but not the run itself.

    Returns the pointer; None if it is missing or damaged.
    """
    pointer = _parse(report, url, RunPointer)
    if pointer is None:
        return None
    run = RunFolder.named(url.rpartition(POINTERS)[0], pointer.run_id)
    facts = read_as(RunFacts, run.at(FACTS))
    if facts is not None:
        report.expect(f"{_name(url)}: variant of {pointer.run_id}", _name(url).split("/")[2], facts.variant)
    if pointer.checkpoint == ENSEMBLE:
        _compare_ensemble(report, _name(url), pointer, run)
        return pointer
    made = read_as(CheckpointManifest, run.checkpoint(pointer.checkpoint).manifest_url)
    what = f"{_name(url)}: smape of {pointer.checkpoint} in {pointer.run_id}"
    if made is None:
        report.bad(what, pointer.smape, "no such checkpoint")
        return pointer
    report.expect(what, made.smape, pointer.smape)
    if pointer.split_sha256 and made.split_sha256:  # earlier versions did not write them
        report.expect(f"{_name(url)}: split_sha256 of {pointer.run_id}", made.split_sha256, pointer.split_sha256)
    return pointer


def _compare_ensemble(report: Report, name: str, pointer: RunPointer, folder: RunFolder) -> None:
    """Compares a pointer with the ensemble in the folder that it names."""
    what = f"{name}: smape of {pointer.run_id}"
    record = read_as(EnsembleRecord, folder.at(ENSEMBLE)) if folder.is_committed() else None
    if record is None:
        report.bad(what, pointer.smape, "no such ensemble")
        return
    report.expect(what, record.smape, pointer.smape)
    report.expect(f"{name}: rows_sha256 of {pointer.run_id}", record.rows_sha256, pointer.split_sha256)
    report.expect(f"{name}: model_sha256 of {pointer.run_id}", record.model_sha256(), pointer.model_sha256)


def check_submission_pointer(report: Report, url: str) -> SubmissionPointer | None:
    """Checks a pointer to a submission, but not the submission itself.

    Returns the pointer; None if it is missing or damaged.
    """
    pointer = _parse(report, url, SubmissionPointer)
    if pointer is None:
        return None
    report.expect(f"{_name(url)}: name", _name(url).split("/")[2], pointer.submission.split("/")[0])
    if OutputFolder(url.rpartition(POINTERS)[0]).submission(pointer.submission).is_committed():
        report.ok(f"{_name(url)}: {pointer.submission}")
    else:
        report.bad(f"{_name(url)}: submission", "one that is committed", pointer.submission)
    return pointer


def _name(url: str) -> str:
    """Path of a pointer below the output: `pointers/runs/qwen_clip/best.json`."""
    return f"pointers/{url.rpartition(POINTERS)[2]}"


def _parse(report: Report, url: str, kind: type[T]) -> T | None:
    """Checks the document itself, and that it was written to this URL and not copied from another pointer."""
    content = read(url)
    pointer = parsed(report, _name(url), content, kind)
    if pointer is not None and content is not None:
        path = validated(PointerPath, content).pointer
        if path:  # earlier versions did not write it
            report.expect(f"{_name(url)}: pointer", _name(url), f"pointers/{path}.json")
    return pointer
