"""Checks of a whole output: every run, submission and pointer in it, and whether one that must exist is missing."""

from __future__ import annotations

from collections.abc import Mapping

from fusion import storage
from fusion.errors import ExitCode
from fusion.records import pointers
from fusion.records.best_run import SERVED, best_of_kind
from fusion.records.manifests import ENSEMBLE, MANIFEST, PULLED
from fusion.records.output import OutputFolder, key_of
from fusion.records.run import RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT, EnsembleRecord, RunPointer, SubmissionManifest
from fusion.verify.ensemble import check_ensemble, is_ensemble
from fusion.verify.findings import Report, read, read_as
from fusion.verify.page import check_pages
from fusion.verify.pointers import check_run_pointer, check_submission_pointer
from fusion.verify.run import CheckedRun, check_run
from fusion.verify.submission import check_submission

Submissions = Mapping[str, SubmissionManifest]  # by <name>/<date>/<digest>


def is_output(output: OutputFolder) -> bool:
    """Whether it has a folder of runs, submissions or pointers that is not empty."""
    return any(output.ls(name) for name in ("runs", "submissions", "pointers"))


def check_output(report: Report, output: OutputFolder, data: str | None) -> None:
    """Checks all runs, submissions and pointers.

    Args:
        data: as for `verify`.
    """
    runs = _check_runs(report, output)
    submissions = _check_submissions(report, output, data)
    to_runs = _pointer_urls(output, "runs")
    expected = _expected_run_pointers(output, runs) | _expected_ensemble_pointers(output, to_runs)
    for pointer_url in sorted(to_runs | expected):
        check_run_pointer(report, pointer_url)
    check_pages(report, output)
    to_submissions = _pointer_urls(output, "submissions")
    for pointer_url in sorted(to_submissions | _expected_submission_pointers(output, submissions)):
        check_submission_pointer(report, pointer_url)


def _pointer_urls(output: OutputFolder, kind: str) -> set[str]:
    """URLs of the pointers to "runs" or "submissions"; each variant or name has a folder of them."""
    return {pointer.url for folder in output.ls("pointers", kind) for pointer in folder.ls()}


def _check_runs(report: Report, output: OutputFolder) -> dict[str, CheckedRun]:
    runs = dict[str, CheckedRun]()
    for run in output.runs():
        if not run.ls():  # an empty folder remains if a run on a file system was killed at its first write
            continue
        with report.within(f"runs/{run.run_id}"):
            if is_ensemble(run, read(run.manifest_url)):
                check_ensemble(report, run)
            else:
                runs[run.run_id] = check_run(report, run)
    return runs


def _check_submissions(report: Report, output: OutputFolder, data: str | None) -> Submissions:
    """Checks all submissions; returns the manifests of those that are committed and not damaged."""
    dates = [date for name in output.ls("submissions") for date in name.ls()]
    folders = {key_of(folder): folder for date in dates for folder in date.ls()}
    committed = {key for key, folder in folders.items() if folder.is_committed()}
    whole = dict[str, SubmissionManifest]()
    for key in sorted(committed):
        with report.within(f"submissions/{key}"):
            manifest = check_submission(report, folders[key], data)
        whole |= {key: manifest} if manifest else {}
    for key in sorted(folders.keys() - committed):
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


def _expected_run_pointers(output: OutputFolder, runs: Mapping[str, CheckedRun]) -> set[str]:
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
        expected |= {pointers.url(output.url, "runs", run.facts.variant, name) for name in names}
    return expected


def _expected_ensemble_pointers(output: OutputFolder, there: set[str]) -> set[str]:
    """URLs of the pointers that must exist because others to ensembles do.

    The pointers to an ensemble are written in the order latest, best of its kind, best. If one exists, so must those
    before it. If none exists, that is no error: the command may have been killed before the first, since an ensemble
    does not record its end.

    Args:
        there: URLs of the pointers to runs and ensembles that exist.
    """

    def pointer_url(name: str) -> str:
        return pointers.url(output.url, "runs", ENSEMBLE_VARIANT, name)

    names = {"latest"} if any(url.split("/")[-2] == ENSEMBLE_VARIANT for url in there) else set[str]()
    served = read_as(RunPointer, pointer_url(SERVED)) if pointer_url(SERVED) in there else None
    record = read_as(EnsembleRecord, RunFolder.named(output.url, served.run_id).at(ENSEMBLE)) if served else None
    names |= {best_of_kind(record.rows_sha256)} if record else set()
    return {pointer_url(name) for name in names}


def _expected_submission_pointers(output: OutputFolder, whole: Submissions) -> set[str]:
    """URLs of the pointers that must exist because a submission names the one that was current before it.

    Submissions that were copied by `jobs/pull.py` are excluded, since the pointer is not copied.
    """
    names = {
        key.split("/")[0]
        for key, manifest in whole.items()
        if manifest.previous and not storage.exists(output.submission(key).at(PULLED))
    }
    return {output.current_url(name) for name in names}
