"""The processes of one node's ranks: starting, stopping and killing them, and finding out why they ended.

Linux only, because there the kernel kills the ranks if the launcher is killed.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from fusion import signals
from fusion.errors import LOST_PEER, ExitCode

POLL = 0.05  # seconds between two checks of the ranks
# Seconds that the other ranks get to exit by themselves after one has failed. Most fail soon, too, because they lose
# their connection to it, and then write why; others hang, and are killed after this time.
SETTLE = 4.0
PR_SET_PDEATHSIG = 1  # option of prctl(2): the signal that a process gets when its parent dies
LIBC = ctypes.CDLL(None)


class FailureKind(IntEnum):
    """How likely a rank's failure is the cause of the others' failures; the lowest value is the most likely cause.

    When a rank fails, ranks that communicate with it fail, too. The message to the user should name the first.
    """

    CAUSE = 0  # an error of its own
    LOST_NODE = 1  # a whole node ended without a report; its ranks may have failed before
    POSSIBLE_CONSEQUENCE = 2  # an unexpected error, which may come from a lost connection
    CONSEQUENCE = 3  # an error of a lost connection to another rank, or a kill by the launcher


@dataclass(frozen=True, order=True)
class Ending:
    """How a rank, a node or all nodes ended. The smallest of several failures is the cause: by kind, then by time."""

    kind: int  # a FailureKind; int, because launchers exchange endings as JSON
    time: float
    code: int
    report: str

    @property
    def failed(self) -> bool:
        return self.code not in (ExitCode.DONE, ExitCode.STOPPED)


class Stop:
    """Records the first stop signal that this process gets; until then, its `name` is empty."""

    def __init__(self) -> None:
        self.name = ""
        signals.catch(self._remember)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name


class Rank:
    """The process of one rank. It has a session of its own, so that Ctrl-C only reaches it through the launcher."""

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self.number = number
        self.code: int | None = None
        self.ended = 0.0
        self.stop_requested = self.killed = False
        die_with_launcher = partial(_die_with, os.getpid())
        self._process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_launcher,  # noqa: PLW1509 (it makes two system calls and takes no locks)
        )

    def is_running(self) -> bool:
        if self.code is None and os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            # Kill the processes that the rank left behind. WNOWAIT has not reaped the rank yet, so the kernel cannot
            # have given its process group id to another process.
            self._kill_group()
            self.code, self.ended = self._process.wait(), time.time()
        return self.code is None

    def request_stop(self) -> None:
        """Sends the stop signal to the rank, but not to its child processes, which it needs to stop in order."""
        # Also recorded for a rank that has ended: Slurm signals every process of a step, so that signal may have ended
        # it.
        self.stop_requested = True
        if self.code is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        self.killed = True
        self._kill_group()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def stopped(self) -> bool:
        """Whether it ended because of a stop request, in order or before it handled signals."""
        return self.code == ExitCode.STOPPED or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether a stop signal killed it, because it had not installed its signal handlers yet."""
        return self.stop_requested and -(self.code or 0) in signals.SIGNALS

    @property
    def failed(self) -> bool:
        """Whether it failed, rather than being stopped or killed by the launcher."""
        return self.code not in (None, ExitCode.DONE) and not self.stopped and not self.killed


def _die_with(launcher: int) -> None:
    """Runs in the new process of a rank: asks the kernel to kill it when the launcher ends for any reason."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # the launcher ended before the call
        os._exit(128 + signal.SIGKILL)


class OtherNodes(Protocol):
    """How the launchers of several nodes exchange failures; `Rendezvous` implements it."""

    def warn(self) -> None: ...

    def is_failing(self) -> bool: ...


class Group:
    """The ranks of this node, from one start to their end."""

    def __init__(self, ranks: Sequence[Rank], grace: float) -> None:
        self._ranks, self._grace = ranks, grace
        self._failing_since = self._stopping_since = math.inf

    def watch(self, stop: Stop, others: OtherNodes) -> None:
        """Waits until all ranks have ended. After a failure or a stop request, kills those that do not end in time."""
        while True:
            running = [rank for rank in self._ranks if rank.is_running()]
            if stop.name:
                self._request_stop()
            if not running:
                return
            overdue = time.monotonic() - self._deadline(others)
            if overdue > SETTLE:
                return  # even SIGKILL does not end a process that hangs inside the kernel, such as in a driver
            if overdue > 0:
                self.kill()
            time.sleep(POLL)

    def _request_stop(self) -> None:
        self._stopping_since = min(self._stopping_since, time.monotonic())
        for rank in self._ranks:
            if not rank.stop_requested:
                rank.request_stop()

    def _deadline(self, others: OtherNodes) -> float:
        """Time after which ranks are killed; infinite while none has failed or stopped."""
        now = time.monotonic()
        if self._failing_since == math.inf and any(rank.failed for rank in self._ranks):
            others.warn()
            self._failing_since = now
        if others.is_failing():
            self._failing_since = min(self._failing_since, now)
        if any(rank.stopped for rank in self._ranks):
            self._stopping_since = min(self._stopping_since, now)
        return min(self._failing_since + SETTLE, self._stopping_since + self._grace)

    def kill(self) -> None:
        for rank in self._ranks:
            if rank.is_running():
                rank.kill()

    def ending(self, folder: Path) -> Ending:
        """How the group ended: with its most likely cause of failure, else with a stop request, else with success.

        Args:
            folder: where ranks write the errors that end them, as `<rank>.json`.
        """
        endings = [self._ending_of(rank, folder / f"{rank.number}.json") for rank in self._ranks]
        failures = [ending for ending in endings if ending.failed]
        if any(rank.stopped_early for rank in self._ranks):
            # That rank closed its connections without warning. Errors of others about that are not failures.
            failures = [ending for ending in failures if ending.kind != FailureKind.CONSEQUENCE]
        if failures:
            return min(failures)
        return max(endings, key=lambda ending: (ending.code, ending.report))

    def _ending_of(self, rank: Rank, path: Path) -> Ending:
        if rank.code not in (0, None) and (reported := _reported_ending(path)):
            return reported
        if not rank.killed or rank.code not in (None, -signal.SIGKILL):
            return _ending_by_code(rank)
        if self._failing_since < math.inf:  # the launcher killed it after another rank had failed
            report = f"error: rank {rank.number} was killed\nhint: see the logs of the other ranks"
            return Ending(FailureKind.CONSEQUENCE, rank.ended, 128 + signal.SIGKILL, report)
        late = f"error: rank {rank.number} had not ended {self._grace:g} s after it was asked to stop, and was killed"
        report = f"{late}\nhint: raise --grace, and the grace period of the pod or job with it"
        return Ending(FailureKind.CAUSE, rank.ended, 128 + signal.SIGKILL, report)


def _reported_ending(path: Path) -> Ending | None:
    """The ending that a rank wrote (see `fusion.command.exit.report`); None if it wrote none.

    The file has the keys code, error, hint, time and, for a bug, traceback.
    """
    try:
        written = json.loads(path.read_text())
        code, report = int(written["code"]), f"error: {written['error']}\nhint: {written['hint']}"
        report = written.get("traceback", "") + report
        return Ending(_failure_kind(code, report), float(written["time"]), code, report)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ending_by_code(rank: Rank) -> Ending:
    """The ending of a rank that wrote no report, from its exit code alone."""
    code = rank.code if rank.code is not None else -signal.SIGKILL
    if code in (ExitCode.DONE, ExitCode.STOPPED):
        return Ending(FailureKind.CAUSE, rank.ended, code, "")
    if rank.stopped:
        report = f"error: rank {rank.number} was asked to stop before it had begun\nhint: run the same command again"
        return Ending(FailureKind.CAUSE, rank.ended, ExitCode.STOPPED, report)
    if code > 0:
        kept = ExitCode.BUG if code == 1 else code  # Python exits with 1 after a traceback
        report = f"error: rank {rank.number} ended with exit code {code}\nhint: see what it wrote above"
        return Ending(_failure_kind(kept), rank.ended, kept, report)
    remedy = "give it more memory if that ran out" if code == -signal.SIGKILL else "report it with the log of the run"
    report = f"error: rank {rank.number} was killed by {signal.Signals(-code).name}\nhint: {remedy}"
    return Ending(_failure_kind(128 - code), rank.ended, 128 - code, report)


def _failure_kind(code: int, report: str = "") -> FailureKind:
    # A rank that loses its peer raises an error that no command expects, or gloo aborts the process.
    if code == ExitCode.BUG:
        return FailureKind.CONSEQUENCE if LOST_PEER.search(report) else FailureKind.POSSIBLE_CONSEQUENCE
    return FailureKind.CONSEQUENCE if code == 128 + signal.SIGABRT else FailureKind.CAUSE
