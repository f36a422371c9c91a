"""Attempts at a run: each process that trains it takes the lease, and records how it started and ended.

A run that was stopped or killed is continued by another attempt. Only the newest attempt holds the lease
(`lease.json`), and only the holder may commit checkpoints. `attempts/<n>/` has the start, the end and the log of each.
"""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from fusion import log, storage
from fusion.errors import LOST_PEER, ExitCode, FusionError, StopRequested, SupersededError
from fusion.records import manifests, schemas
from fusion.records.contention import turns
from fusion.records.run import EXIT, LEASE, LOG, START, RunFolder
from fusion.records.schemas import AttemptEnd, AttemptStart, LeaseRecord

# Seconds to retry an unreachable store while an attempt that failed or was stopped records its end. Schedulers kill a
# job soon after they ask it to stop (Kubernetes after 30 s by default); a longer retry would lose the exit code.
PATIENCE_AT_THE_END = 5.0


@dataclass(frozen=True)
class Lease:
    """The right to publish under a run, which the newest attempt holds.

    Attributes:
        url: of `lease.json`.
        attempt: number of the attempt, from 1.
        token: random text in `lease.json` that identifies the holder.
    """

    url: str
    attempt: int
    token: str

    def check(self) -> None:
        """Raises SupersededError if a newer attempt has taken the lease."""
        held = schemas.read_required(LeaseRecord, self.url)
        if held.token != self.token:
            raise SupersededError(
                f"attempt {held.attempt} of this run began while this one, {self.attempt}, was still running",
                "let the newer one finish; to run two jobs at once, give each its own --run-id",
            )


def take_lease(run: RunFolder) -> Lease:
    """Makes this the newest attempt at the run: writes `lease.json` with the next number, by compare-and-swap."""
    url, token = run.at(LEASE), uuid.uuid4().hex
    for _ in turns(url):
        held = storage.read_version(url)
        number = 1 if held is None else 1 + schemas.parse(LeaseRecord, held[0], url).attempt
        data = schemas.seal(asdict(LeaseRecord(number, token, schemas.now())))
        is_written = storage.create(url, data) if held is None else storage.replace(url, data, held[1])
        if is_written:
            return Lease(url, number, token)
    raise AssertionError("turns() raises an error after its last turn")


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: its exit code and, for an error, what went wrong and what to do about it."""

    code: int
    error: str | None = None
    hint: str | None = None


@contextmanager
def attempt(run: RunFolder) -> Iterator[Lease]:
    """Takes the lease and records the start, the end and the log of one attempt, also if it fails or is stopped."""
    # Warns in the log if the store lacks conditional writes: then two simultaneous attempts could mix their files.
    storage.honours_conditions(run.url)
    lease = take_lease(run)
    start = AttemptStart(lease.attempt, schemas.now())
    storage.write(run.attempt(lease.attempt).at(START), schemas.seal(asdict(start)))
    end = Ending(ExitCode.BUG)  # until the attempt is known to have ended otherwise
    try:
        try:
            yield lease
            end = Ending(ExitCode.DONE)
        except StopRequested:
            _check_progress(run, lease.attempt)
            raise
    except FusionError as error:
        end = end_of(error)
        raise
    except KeyboardInterrupt:
        end = Ending(128 + signal.SIGINT, "interrupted")
        raise
    except BaseException as error:
        end = _unexpected_end(error)
        raise
    finally:
        record_end(lease, end)


def _unexpected_end(error: BaseException) -> Ending:
    """The end to record for an unexpected error: a bug, unless the error is that another rank was lost.

    A lost rank has the exit code that the launcher gives then, 137, as if this process had been killed too.
    """
    description = f"{type(error).__name__}: {error}"
    if isinstance(error, RuntimeError) and LOST_PEER.search(description):
        hint = "see how the other ranks ended; the same command goes on from the last checkpoint"
        return Ending(128 + signal.SIGKILL, f"another rank was lost: {description}", hint)
    return Ending(ExitCode.BUG, description)


def end_of(error: FusionError) -> Ending:
    """The end to record for an error that has an exit code and a hint."""
    return Ending(error.code, error.message, error.remedy)


def record_end(lease: Lease, end: Ending) -> None:
    """Writes `log.txt` and then `exit.json` of an attempt. If the store is unreachable, warns; the exit code stands."""
    run = RunFolder(lease.url.rpartition("/")[0])
    folder = run.attempt(lease.attempt)
    if end.code != ExitCode.DONE:
        storage.set_patience(min(PATIENCE_AT_THE_END, storage.patience()))
    try:
        (log_entry,) = manifests.write_files(folder, {LOG: log.text().encode()})
        record = AttemptEnd(
            attempt=lease.attempt,
            code=end.code,
            error=end.error,
            hint=end.hint,
            step=_newest_step(run),
            ended=schemas.now(),
            log=log_entry,
        )
        storage.write(folder.at(EXIT), schemas.seal(schemas.written(record)))
    except FusionError as error:
        log.warning(event="end_not_recorded", reason=error.message)


def _newest_step(run: RunFolder) -> int:
    """Step of the newest committed checkpoint; -1 if there is none."""
    return max((found.manifest.step for found in run.checkpoints()), default=-1)


def _check_progress(run: RunFolder, number: int) -> None:
    """Raises an error at the third stop in a row without a newer checkpoint.

    A stop has exit code 75, on which schedulers run the job again. If the job is always stopped before its first new
    checkpoint, that would go on for ever; after three stops the exit code is 70 instead.
    """
    step = _newest_step(run)
    for earlier in (number - 1, number - 2):
        end = schemas.read_if_whole(AttemptEnd, run.attempt(earlier).at(EXIT), "attempt_damaged")
        if end is None or end.code != ExitCode.STOPPED or end.step != step:
            return
    raise FusionError(
        f"stopped three times in a row without a newer checkpoint than step {step}",
        "give the job more time before it is stopped, or lower --checkpoint-seconds",
    )
