"""What lies in a bucket: runs and submissions, and how they ended. Lists no more than the folders that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from fusion import pointers, storage
from fusion.errors import DataError, ExitCode
from fusion.manifests import MANIFEST, validated
from fusion.records import (
    AttemptEnd,
    LeaseRecord,
    RunFacts,
    SubmissionManifest,
    SubmissionPointer,
    read,
)
from jobs.results.transfer import N_THREADS

T = TypeVar("T")
U = TypeVar("U")

LEASE = "lease.json"


@dataclass(frozen=True)
class Run:
    """A run as a list shows it.

    Attributes:
        smape: validation SMAPE of its best checkpoint, in %; None before the first.
        state: finished, running, stopped, failed, or unreadable. One that was killed outright never said so: running.
        code: exit code of its newest attempt, once that has ended.
        started, ended: of the run and of its newest attempt.
        error: what the newest attempt, or the reading of the run, says went wrong.
    """

    run_id: str
    variant: str = ""
    smape: float | None = None
    state: str = "unreadable"
    code: int | None = None
    attempts: int = 0
    started: str = ""
    ended: str = ""
    error: str = ""


@dataclass(frozen=True)
class Submission:
    name: str
    date: str
    digest: str
    rows: int | None
    run: str
    current: bool
    error: str = ""


def list_runs(output: str, variant: str | None = None) -> list[Run]:
    """All runs, newest first."""
    runs = _in_parallel(_describe_run, storage.ls(storage.join(output, "runs")))
    wanted = [run for run in runs if variant in (None, run.variant)]
    return sorted(wanted, key=lambda run: (run.started, run.run_id), reverse=True)


def _describe_run(url: str) -> Run:
    run_id = storage.base(url)
    try:
        facts = read(RunFacts, storage.join(url, "run.json"))  # none: it never read its data
        lease = read(LeaseRecord, storage.join(url, LEASE))
        if lease is None:
            return Run(run_id, error="it has no lease.json: no attempt ever began")
        end = read(AttemptEnd, storage.join(url, "attempts", str(lease.attempt), "exit.json"))
        smapes = [checkpoint.smape for checkpoint in validated(url)]
    except DataError as error:
        return Run(run_id, error=error.message)
    return Run(
        run_id,
        facts.variant if facts else "",
        min(smapes, default=None),
        _state(end),
        end.code if end else None,
        lease.attempt,
        facts.started if facts else lease.started,
        end.ended if end else "",
        end.error if end else "",
    )


def _state(end: AttemptEnd | None) -> str:
    if end is None:
        return "running"
    return {int(ExitCode.DONE): "finished", int(ExitCode.STOPPED): "stopped"}.get(end.code, "failed")


def list_submissions(output: str, name: str | None = None) -> list[Submission]:
    """All committed submissions, newest date first."""
    root = storage.join(output, "submissions")
    names = [storage.join(root, name)] if name else storage.ls(root)
    folders = [folder for dates in _in_parallel(_dates, names) for folder in dates]
    current = {storage.base(url): current_of(output, storage.base(url)) for url in names}
    found = [one for one in _in_parallel(lambda url: _describe_submission(url, current), folders) if one]
    return sorted(found, key=lambda one: (one.date, one.name, one.current), reverse=True)


def _dates(url: str) -> list[str]:
    return [folder for date in storage.ls(url) for folder in storage.ls(date)]


def _describe_submission(url: str, current: dict[str, str | None]) -> Submission | None:
    name, date, digest = url.split("/")[-3:]
    is_current = current[name] == f"{name}/{date}/{digest}"
    try:
        manifest = read(SubmissionManifest, storage.join(url, MANIFEST))
    except DataError as error:
        return Submission(name, date, digest, None, "", is_current, error.message)
    return Submission(name, date, digest, manifest.rows, storage.base(manifest.run), is_current) if manifest else None


def current_of(output: str, name: str) -> str | None:
    pointer = read(SubmissionPointer, pointers.url(output, "submissions", name, "current"))
    return pointer.submission if pointer else None


def _in_parallel(action: Callable[[U], T], values: Iterable[U]) -> list[T]:
    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(action, values))
