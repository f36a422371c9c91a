"""A submitted job and its state, described in the same way for every cluster.

All of it is asked from the cluster each time; there is no local record of jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from fusion.errors import DataError

WAITING, RUNNING, FINISHED, FAILED, CANCELLED = "waiting", "running", "finished", "failed", "cancelled"
PREFIX = "fusion-"  # of the names of all jobs
POLL_LOG = 1.0  # seconds between two reads of a log that is followed
POLL_STATE = 5.0  # seconds between two requests for the state of its job; the controllers of clusters limit requests


@dataclass(frozen=True)
class SentJob:
    """A submitted job. Times are UTC. What has not happened yet, or is not known, is empty.

    Attributes:
        id: the id for `jobs/control.py`: 1234 or 1234_1 on Slurm, job/NAME or jobset/NAME on Kubernetes, or here/PID.
        state: waiting, running, finished, failed or cancelled.
        why: the reason for the state, as the cluster gives it.
        code: exit code; None before the job has ended.
        sent, started, ended: times of submission, start and end.
        log: the path of the log, or the command that shows it.
        said: the last line of the log; for a failed job its error.
    """

    id: str
    name: str
    state: str
    why: str = ""
    code: int | None = None
    sent: str = ""
    started: str = ""
    ended: str = ""
    log: str = ""
    said: str = ""

    @property
    def is_over(self) -> bool:
        return self.state not in (WAITING, RUNNING)


class Jobs(Protocol):
    """The jobs of one cluster.

    All methods raise UnreachableError when the cluster does not answer, CredentialsError when it denies access, and
    ConfigError when it refuses a request.
    """

    def all(self, days: int) -> list[SentJob]:
        """The jobs that were submitted in the last `days` days."""

    def find(self, job_id: str) -> list[SentJob]:
        """The job with this id, or all tasks of an array; raises DataError when there is no such job."""

    def log(self, job: SentJob, *, node: int, follow: bool) -> Iterator[str]:
        """Yields the lines of a job's log.

        Args:
            node: which of the job's nodes.
            follow: also yield new lines until the job has ended, across restarts.
        """

    def cancel(self, job: SentJob) -> None:
        """Asks a job to stop for good. It commits a checkpoint, and ends."""

    def wait(self, jobs: Sequence[SentJob]) -> int:
        """Waits until the jobs have ended; returns the exit code of the first that does not end with 0, or 0."""


def format_time(seconds: float) -> str:
    """Seconds since 1970 as a UTC time in ISO 8601, as in all JSON documents of runs.

    >>> format_time(0)
    '1970-01-01T00:00:00Z'
    """
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def read_lines(path: Path, is_over: Callable[[], bool] | None = None) -> Iterator[str]:
    """Yields the lines of a file; with `is_over`, also those that are written until it returns True.

    Raises:
        DataError: the file does not exist; with `is_over`, it still did not exist when that returned True.
    """
    tail, asked, over = _Tail(path), -POLL_STATE, is_over is None
    while True:
        if is_over and time.monotonic() - asked >= POLL_STATE:
            over, asked = is_over(), time.monotonic()
        # The file is read after the state was asked for, so that lines written before the end are not missed.
        yield from tail.new_lines()
        if over:
            break
        time.sleep(POLL_LOG)
    if not tail.is_open:
        hint = "try again when the job runs, or give the settings that it was sent with as --settings"
        raise DataError(f"there is no log {path} yet", hint)
    yield from tail.unfinished_line()


class _Tail:
    """Reads a growing file: at each call the complete lines that are new."""

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._rest = path, 0, b""
        self.is_open = False

    def new_lines(self) -> Iterator[str]:
        """Yields the complete lines that were added since the last call; none while the file does not exist."""
        try:
            with self._path.open("rb") as file:
                self.is_open = True
                file.seek(self._place)
                while chunk := file.read(2**16):
                    self._place += len(chunk)
                    *whole, self._rest = (self._rest + chunk).split(b"\n")
                    yield from (line.decode(errors="replace") for line in whole)
        except FileNotFoundError:
            return

    def unfinished_line(self) -> Iterator[str]:
        """Yields the last line if it does not end with a line break."""
        if self._rest:
            yield self._rest.decode(errors="replace")


def last_line(path: Path) -> str:
    """The last line of a file that is not blank, from the last 16 KiB; empty when there is no such line or no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**14))
            said = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(said) if line.strip()), "")
