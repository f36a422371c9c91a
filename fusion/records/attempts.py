"""Attempts at a run: the lease that only the newest one holds, and how each of them started and ended."""

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

PATIENCE_AT_THE_END = 5.0  # seconds to retry a silent store when an attempt has failed or was stopped


@dataclass(frozen=True)
class Lease:
    """The right to publish under a run. The newest attempt has it; `check` tells an older one that it has lost it."""

    url: str
    attempt: int
    token: str

    def check(self) -> None:
        """Raises SupersededError when a newer attempt has begun."""
        held = schemas.read_required(LeaseRecord, self.url)
        if held.token != self.token:
            raise SupersededError(
                f"attempt {held.attempt} of this run began while this one, {self.attempt}, was still running",
                "let the newer one finish; two jobs that run at once need a --run-id each",
            )


def take_lease(run: RunFolder) -> Lease:
    """Makes this the newest attempt of the run."""
    url, token = run.at(LEASE), uuid.uuid4().hex
    for _ in turns(url):
        held = storage.read_version(url)
        number = 1 if held is None else 1 + schemas.parse(LeaseRecord, held[0], url).attempt
        data = schemas.seal(asdict(LeaseRecord(number, token, schemas.now())))
        if storage.create(url, data) if held is None else storage.replace(url, data, held[1]):
            return Lease(url, number, token)
    raise AssertionError("the turns end with an error")


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: its exit code and, for an error, what went wrong and what to do about it."""

    code: int
    error: str | None = None
    hint: str | None = None


@contextmanager
def attempt(run: RunFolder) -> Iterator[Lease]:
    """Records the start and the end of one try at a run, with its log, whichever way it ends."""
    storage.honours_conditions(run.url)  # or the log says that nothing keeps two attempts at this run from mixing
    lease = take_lease(run)
    folder = run.attempt_url(lease.attempt)
    start = AttemptStart(lease.attempt, schemas.now())
    storage.write(storage.join(folder, START), schemas.seal(asdict(start)))
    end = Ending(ExitCode.BUG)
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
    """A bug; or, where another rank was lost, what the launcher ends with then."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, RuntimeError) and LOST_PEER.search(said):
        hint = "see how the other ranks ended; the same command goes on from the last checkpoint"
        return Ending(128 + signal.SIGKILL, f"another rank was lost: {said}", hint)
    return Ending(ExitCode.BUG, said)


def end_of(error: FusionError) -> Ending:
    return Ending(error.code, error.message, error.remedy)


def record_end(lease: Lease, end: Ending) -> None:
    """Writes `exit.json` and `log.txt` of an attempt. A store that does not answer is no other end of it: a warning."""
    run = RunFolder(lease.url.rpartition("/")[0])
    folder = run.attempt_url(lease.attempt)
    if end.code != ExitCode.DONE:
        storage.set_patience(min(PATIENCE_AT_THE_END, storage.patience()))  # the kill after a stop may be near
    try:
        (said,) = manifests.write_files(folder, {LOG: log.text().encode()})
        record = AttemptEnd(
            attempt=lease.attempt,
            code=end.code,
            error=end.error,
            hint=end.hint,
            step=_newest_step(run),
            ended=schemas.now(),
            log=said,
        )
        storage.write(storage.join(folder, EXIT), schemas.seal(schemas.written(record)))
    except FusionError as error:
        log.warning(event="end_not_recorded", reason=error.message)


def _newest_step(run: RunFolder) -> int:
    return max((found.manifest.step for found in run.checkpoints()), default=-1)


def _check_progress(run: RunFolder, number: int) -> None:
    """Turns the third stop in a row without a newer checkpoint into an error: running again would not help."""
    step = _newest_step(run)
    for earlier in (number - 1, number - 2):
        url = storage.join(run.attempt_url(earlier), EXIT)
        end = schemas.read_if_whole(AttemptEnd, url, "attempt_damaged")
        if end is None or end.code != ExitCode.STOPPED or end.step != step:
            return
    raise FusionError(
        f"stopped three times in a row without a newer checkpoint than step {step}",
        "give the job more time before it is stopped, or lower --checkpoint-seconds",
    )
