"""A job that was sent, as its cluster has it now, in the same words for every cluster; nothing of it is kept here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from fusion.errors import DataError

WAITING, RUNNING, FINISHED, FAILED, CANCELLED = "waiting", "running", "finished", "failed", "cancelled"
PREFIX = "fusion-"  # every job's name begins so
LOOK = 1.0  # seconds between two looks at a log that grows
ASK = 5.0  # seconds between two questions whether its job has ended


@dataclass(frozen=True)
class Sent:
    """Times are UTC; what has not happened yet, or is not known, is empty.

    Attributes:
        id: as `jobs/control.py` takes it: 1234 or 1234_1 on Slurm, job/NAME or jobset/NAME on Kubernetes, here/PID.
        state: waiting, running, finished, failed or cancelled.
        why: what the cluster itself says of that.
        code: exit code, once it has ended.
        log: where it is, or what shows it.
        said: the last line of its log; of a failed job the error.
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
    """The jobs of one cluster. All of its methods raise UnreachableError, CredentialsError or ConfigError."""

    def all(self, days: int) -> list[Sent]:
        """Those that were sent in the last days."""

    def find(self, job_id: str) -> list[Sent]:
        """A job, of an array all of its tasks; DataError when there is none."""

    def log(self, job: Sent, *, node: int, follow: bool) -> Iterator[str]:
        """Lines of its log; with `follow`, also those that come until it has ended, whatever restarts it meanwhile."""

    def cancel(self, job: Sent) -> None:
        """Asks it to stop for good; it commits what it has done, and ends."""

    def wait(self, jobs: Sequence[Sent]) -> int:
        """Exit code of the first of them that does not end with 0."""


def moment(seconds: float) -> str:
    """Seconds since 1970 as a document has a time.

    >>> moment(0)
    '1970-01-01T00:00:00Z'
    """
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def lines(path: Path, is_over: Callable[[], bool] | None = None) -> Iterator[str]:
    """Lines of a file; where `is_over` is given, also those that are written until it says so.

    Raises:
        DataError: there is no such file, and nothing that would write it.
    """
    tail, asked, over = _Tail(path), -ASK, is_over is None
    while True:
        if is_over and time.monotonic() - asked >= ASK:
            over, asked = is_over(), time.monotonic()
        yield from tail.more()  # after the question: what was written before the end is read
        if over:
            break
        time.sleep(LOOK)
    if not tail.is_open:
        raise DataError(f"there is no log {path} yet", "ask again once the job runs, or let --settings name its folder")
    yield from tail.rest()


class _Tail:
    """What is new in a file at each look; a line is whole, or the last one."""

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._rest = path, 0, b""
        self.is_open = False

    def more(self) -> Iterator[str]:
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

    def rest(self) -> Iterator[str]:
        if self._rest:
            yield self._rest.decode(errors="replace")


def last_line(path: Path) -> str:
    """The last line of a file that says something; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**14))
            said = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(said) if line.strip()), "")
