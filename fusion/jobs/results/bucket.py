"""Lists the runs and submissions in a bucket, and how the runs ended.

One listing request finds all objects. Of those, only the small JSON documents that a list needs are read, in parallel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from fusion import storage
from fusion.errors import DataError, ExitCode
from fusion.records.best_run import pointed_to
from fusion.records.manifests import ENSEMBLE, MANIFEST, Checkpoint, best_of
from fusion.records.output import OutputFolder
from fusion.records.run import FACTS, LEASE, RunFolder, checkpoint_in
from fusion.records.schemas import (
    AttemptEnd,
    AttemptStart,
    RunFacts,
    SubmissionManifest,
    SubmissionPointer,
    read,
)
from fusion.storage import Entry

T = TypeVar("T")
U = TypeVar("U")

Listing = Mapping[str, Entry]  # objects by their path below a folder

# Documents read at the same time. s3fs keeps ten connections by default, so that more threads would only wait.
N_THREADS = 10
# A training commits a checkpoint every minute unless --checkpoint-seconds sets another interval, and ends itself after
# 10 minutes without a step (--stall-timeout). A run that has written nothing for 15 minutes was most likely killed with
# SIGKILL, which leaves no record. A training with rarer checkpoints looks silent although it is running.
SILENT_AFTER = timedelta(minutes=15)


@dataclass(frozen=True)
class Run:
    """One run in a list. Times are UTC.

    Attributes:
        smape: validation SMAPE of its best checkpoint, in %; None before the first checkpoint.
        state: finished, running, silent, stopped, failed, or unreadable. A run without a record of its end is running,
            and silent when none of its files has been written for `SILENT_AFTER`.
        code: exit code of its newest attempt; None while that is running.
        attempts: how often the run was started.
        started, ended: start of the run, and end of its newest attempt.
        last_sign: when one of its files was last written; empty where the store keeps no times.
        split: 12 hex digits that are equal for runs that validated on the same rows; empty before the first checkpoint.
        served: whether predictions use it unless they name another run.
        error: the error of the newest attempt, or why the run cannot be read.
    """

    run_id: str
    variant: str = ""
    smape: float | None = None
    state: str = "unreadable"
    code: int | None = None
    attempts: int = 0
    started: str = ""
    ended: str = ""
    last_sign: str = ""
    split: str = ""
    served: bool = False
    error: str = ""

    @property
    def is_failed_try(self) -> bool:
        """Whether it ended with an error before its first validated checkpoint."""
        return self.state == "failed" and self.smape is None


@dataclass(frozen=True)
class Submission:
    """One committed submission in a list.

    Attributes:
        rows: number of rows; None when the manifest is damaged.
        run: id of the run that made the predictions.
        current: whether it is the one that is published under its name.
        error: why its manifest cannot be read.
    """

    name: str
    date: str
    digest: str
    rows: int | None
    run: str
    current: bool
    error: str = ""


def list_runs(output: str) -> list[Run]:
    """All runs: first the finished ones, then the others, each newest first."""
    folders, now = _by_folder(storage.find(OutputFolder(output).at("runs")), depth=1), datetime.now(UTC)
    runs = _in_parallel(lambda name: _describe_run(RunFolder.named(output, name), folders[name], now), folders)
    served = _served(output, {run.variant for run in runs if run.variant})
    marked = [replace(run, served=run.run_id in served) for run in runs]
    newest = sorted(marked, key=lambda run: (run.started, run.run_id), reverse=True)
    return sorted(newest, key=lambda run: run.state != "finished")


def _by_folder(listing: Listing, depth: int) -> dict[str, Listing]:
    """The objects of each folder `depth` levels down, by their paths below that folder."""
    folders: dict[str, dict[str, Entry]] = defaultdict(dict)
    for path, found in listing.items():
        parts = path.split("/")
        if len(parts) > depth:
            folders["/".join(parts[:depth])]["/".join(parts[depth:])] = found
    return dict(folders)


def _served(output: str, variants: Iterable[str]) -> set[str]:
    """Ids of the runs that predictions use."""
    found = _in_parallel(lambda variant: pointed_to(output, variant), variants)
    return {pointer.run_id for pointer in found if pointer}


def _describe_run(folder: RunFolder, listing: Listing, now: datetime) -> Run:
    """The run as a list shows it, whatever state its files are in; raises no DataError."""
    seen = max((found.modified for found in listing.values() if found.modified), default=None)
    sign = f"{seen.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if seen else ""
    if ENSEMBLE in listing:
        return _describe_ensemble(folder, listing, sign)
    if LEASE not in listing:
        return Run(folder.run_id, last_sign=sign, error="there is no lease.json: the run was never started")
    try:
        run = _read_run(folder, listing)
    except DataError as error:
        return Run(folder.run_id, last_sign=sign, error=error.message)
    if run.state == "running" and seen and now - seen > SILENT_AFTER:
        return replace(run, state="silent", last_sign=sign, error=f"nothing written since {sign}: most likely killed")
    return replace(run, last_sign=sign)


def _describe_ensemble(folder: RunFolder, listing: Listing, sign: str) -> Run:
    run_id = folder.run_id
    if MANIFEST not in listing:
        return Run(run_id, "ensemble", last_sign=sign, error="the ensemble is incomplete: make it again")
    try:
        record, facts = folder.ensemble(), _read_listed(RunFacts, folder, FACTS, listing)
    except DataError as error:
        return Run(run_id, "ensemble", last_sign=sign, error=error.message)
    started, rows = facts.started if facts else "", record.rows_sha256[:12]
    return Run(run_id, "ensemble", record.smape, "finished", 0, 1, started, started, sign, rows)


def _read_run(folder: RunFolder, listing: Listing) -> Run:
    attempt = max((int(name) for name in _by_folder(_below(listing, "attempts"), 1) if name.isdecimal()), default=1)
    facts = _read_listed(RunFacts, folder, FACTS, listing)  # None for a run that ended before it had read its data
    end = _read_listed(AttemptEnd, folder, f"attempts/{attempt}/exit.json", listing)
    begun = facts or _read_listed(AttemptStart, folder, f"attempts/{attempt}/start.json", listing)
    best = best_checkpoint(folder, listing)
    return Run(
        folder.run_id,
        facts.variant if facts else "",
        best.smape if best else None,
        _state(end),
        end.code if end else None,
        attempt,
        started=begun.started if begun else "",
        ended=end.ended if end else "",
        split=best.manifest.split_sha256[:12] if best else "",
        error=(end.error or "") if end else "",
    )


def _read_listed(kind: type[T], folder: RunFolder, path: str, listing: Listing) -> T | None:
    """The document, or None when the listing does not have it, which saves a request."""
    return read(kind, folder.at(path)) if path in listing else None


def _below(listing: Listing, folder: str) -> Listing:
    return {path.removeprefix(f"{folder}/"): found for path, found in listing.items() if path.startswith(f"{folder}/")}


def best_checkpoint(run: RunFolder, listing: Listing) -> Checkpoint | None:
    """The best committed checkpoint that was validated. A damaged checkpoint is logged and skipped."""
    folders = _by_folder(_below(listing, "checkpoints"), 1)
    found = [checkpoint_in(run.checkpoint(name)) for name, files in folders.items() if MANIFEST in files]
    validated = [made for made in found if made and made.manifest.smape is not None]
    return best_of(validated) if validated else None


def _state(end: AttemptEnd | None) -> str:
    """The state of a run, given how its newest attempt ended; None: there is no record of an end."""
    if end is None:
        return "running"
    return {int(ExitCode.DONE): "finished", int(ExitCode.STOPPED): "stopped"}.get(end.code, "failed")


def list_submissions(output: str, name: str | None = None) -> list[Submission]:
    """All committed submissions, newest date first."""
    folder = OutputFolder(output)
    listing = storage.find(folder.at("submissions", *([name] if name else [])))
    if name:
        listing = {f"{name}/{path}": found for path, found in listing.items()}
    keys = [path for path, files in _by_folder(listing, depth=3).items() if MANIFEST in files]
    names = sorted({key.split("/")[0] for key in keys})
    current = dict(zip(names, _in_parallel(lambda one: current_of(folder, one), names), strict=True))
    found = _in_parallel(lambda key: _describe_submission(folder, key, current), keys)
    return sorted(filter(None, found), key=lambda one: (one.date, one.name, one.current), reverse=True)


def _describe_submission(output: OutputFolder, key: str, current: Mapping[str, str | None]) -> Submission | None:
    name, date, digest = key.split("/")
    is_current = current[name] == key
    try:
        manifest = read(SubmissionManifest, output.submission(key).manifest_url)
    except DataError as error:
        return Submission(name, date, digest, None, "", is_current, error.message)
    return Submission(name, date, digest, manifest.rows, storage.base(manifest.run), is_current) if manifest else None


def current_of(output: OutputFolder, name: str) -> str | None:
    """Key of the submission that is published under a name; None when there is none."""
    pointer = read(SubmissionPointer, output.current_url(name))
    return pointer.submission if pointer else None


def _in_parallel(action: Callable[[U], T], values: Iterable[U]) -> list[T]:
    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(action, values))
