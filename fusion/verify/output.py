"""Checks of a whole output: every run, submission and pointer in it, and whether one that must exist is missing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from pydantic import ValidationError

from fusion import storage
from fusion.errors import ExitCode
from fusion.records.best_run import SERVED, best_of_kind
from fusion.records.manifests import MANIFEST, PULLED
from fusion.records.run import RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT, RunPointer, SubmissionManifest, validated
from fusion.verify.ensemble import check_ensemble, is_ensemble, record_in
from fusion.verify.findings import Report, read
from fusion.verify.pointers import check_run_pointer, check_submission_pointer
from fusion.verify.run import CheckedRun, check_run
from fusion.verify.submission import check_submission

Submissions = Mapping[str, SubmissionManifest]  # by <name>/<date>/<digest>


def is_output(url: str) -> bool:
    """Whether the URL has a folder of runs, submissions or pointers that is not empty."""
    return any(storage.ls(storage.join(url, name)) for name in ("runs", "submissions", "pointers"))


def check_output(report: Report, url: str, data: str | None) -> None:
    """Checks all runs, submissions and pointers.

    Args:
        data: as for `verify`.
    """
    runs = _check_runs(report, url)
    submissions = _check_submissions(report, url, data)
    pointers = storage.join(url, "pointers")
    to_runs = _pointer_urls(storage.join(pointers, "runs"))
    expected = _expected_run_pointers(pointers, runs) | _expected_ensemble_pointers(url, to_runs)
    for pointer_url in sorted(to_runs | expected):
        check_run_pointer(report, pointer_url)
    to_submissions = _pointer_urls(storage.join(pointers, "submissions"))
    for pointer_url in sorted(to_submissions | _expected_submission_pointers(url, pointers, submissions)):
        check_submission_pointer(report, pointer_url)


def _pointer_urls(folder: str) -> set[str]:
    """URLs of the pointers in a folder such as `pointers/runs`, which has one folder per variant or name."""
    return {url for subfolder in storage.ls(folder) for url in storage.ls(subfolder)}


def _check_runs(report: Report, url: str) -> dict[str, CheckedRun]:
    runs = dict[str, CheckedRun]()
    for folder in storage.ls(storage.join(url, "runs")):
        if not storage.ls(folder):  # an empty folder remains if a run on a file system was killed at its first write
            continue
        with report.within(f"runs/{storage.base(folder)}"):
            if is_ensemble(folder, read(storage.join(folder, MANIFEST))):
                check_ensemble(report, folder)
            else:
                runs[storage.base(folder)] = check_run(report, RunFolder(folder))
    return runs


def _check_submissions(report: Report, url: str, data: str | None) -> Submissions:
    """Checks all submissions; returns the manifests of those that are committed and not damaged."""
    names = storage.ls(storage.join(url, "submissions"))
    folders = [folder for name in names for date in storage.ls(name) for folder in storage.ls(date)]
    keys = {"/".join(folder.split("/")[-3:]): folder for folder in folders}
    committed = {key for key, folder in keys.items() if storage.exists(storage.join(folder, MANIFEST))}
    whole = dict[str, SubmissionManifest]()
    for key in sorted(committed):
        with report.within(f"submissions/{key}"):
            manifest = check_submission(report, keys[key], data)
        whole |= {key: manifest} if manifest else {}
    for key in sorted(keys.keys() - committed):
        _check_uncommitted(report, key, whole)
    return whole


def _check_uncommitted(report: Report, key: str, whole: Submissions) -> None:
    """Reports a submission without a manifest.

    A job that is killed while it publishes leaves one: only a note. But if another submission names it as the one that
    was current before, it had been committed, and its manifest was lost.
    """
    later = [other for other, manifest in whole.items() if manifest.previous == key]
    if later:
        report.bad(f"submissions/{key}/{MANIFEST}", f"a file, as {later[0]} names this submission", "no such file")
    else:
        report.note(f"submissions/{key}: not committed, so it does not count")


def _expected_run_pointers(pointers: str, runs: Mapping[str, CheckedRun]) -> set[str]:
    """URLs of the pointers that must exist because of runs that finished.

    An attempt moves the pointers before it records its end.
    """
    expected = set()
    for run in runs.values():
        ended_well = any(end.code == ExitCode.DONE for end in run.ends.values())
        if run.facts is None or run.left_out is not None or not ended_well:
            continue
        names = ["latest", SERVED]
        if run.newest and run.newest.run_sha256:  # earlier versions, without this field, had no best of each kind
            names.append(best_of_kind(run.newest.split_sha256))
        expected |= {storage.join(pointers, "runs", run.facts.variant, f"{name}.json") for name in names}
    return expected


def _expected_ensemble_pointers(url: str, there: set[str]) -> set[str]:
    """URLs of the pointers that must exist because others to ensembles do.

    The pointers to an ensemble are written in the order latest, best of its kind, best. If one exists, so must those
    before it. If none exists, that is no error: the command may have been killed before the first, since an ensemble
    does not record its end.

    Args:
        there: URLs of the pointers to runs and ensembles that exist.
    """
    folder = storage.join(url, "pointers", "runs", ENSEMBLE_VARIANT)
    mine = {storage.base(pointer_url) for pointer_url in there if pointer_url.startswith(f"{folder}/")}
    names = {"latest.json"} if mine else set[str]()
    content = read(storage.join(folder, f"{SERVED}.json")) if f"{SERVED}.json" in mine else None
    with suppress(ValidationError):
        served = None if content is None else validated(RunPointer, content)
        record = record_in(storage.join(url, "runs", served.run_id)) if served else None
        names |= {f"{best_of_kind(record.rows_sha256)}.json"} if record else set()
    return {storage.join(folder, name) for name in names}


def _expected_submission_pointers(url: str, pointers: str, whole: Submissions) -> set[str]:
    """URLs of the pointers that must exist because a submission names the one that was current before it.

    Submissions that were copied by `jobs/pull.py` are excluded, since the pointer is not copied.
    """
    names = {
        key.split("/")[0]
        for key, manifest in whole.items()
        if manifest.previous and not storage.exists(storage.join(url, "submissions", key, PULLED))
    }
    return {storage.join(pointers, "submissions", name, "current.json") for name in names}
