"""The processes of one node's ranks: started, told to stop, killed, and how they ended.

Linux only: there the kernel ends the ranks of a launcher that was killed.
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
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from fusion import signals
from fusion.errors import LOST_PEER, ExitCode

POLL = 0.05  # seconds between two looks at the ranks
SETTLE = 4.0  # seconds that the others get to end by themselves when a rank has failed
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
CAUSE, GONE, MAYBE_ECHO, ECHO = range(4)  # what a failure is in view of the other ranks' failures; gone: a whole node


@dataclass(frozen=True, order=True)
class Ending:
    """How a rank, a node or all of them ended. Of several failures the least is the cause."""

    suspicion: int
    time: float
    code: int
    report: str

    @property
    def failed(self) -> bool:
        return self.code not in (ExitCode.DONE, ExitCode.STOPPED)


class Stop:
    """The first stop signal that this process got; its `name` is empty until then."""

    def __init__(self) -> None:
        self.name = ""
        signals.catch(self._remember)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name


class Rank:
    """One process, in a session of its own: a terminal's Ctrl-C reaches it once, through the launcher."""

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self.number = number
        self.code: int | None = None
        self.ended = 0.0
        self.told = self.killed = False
        bond = partial(_die_with, os.getpid())
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=bond)  # noqa: PLW1509

    def is_running(self) -> bool:
        if self.code is None and os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._kill_group()  # what it left behind; its id belongs to no other until the rank is reaped, below
            self.code, self.ended = self._process.wait(), time.time()
        return self.code is None

    def tell(self) -> None:
        """Asks the rank to stop, and it alone: a rank whose loaders die of the signal cannot stop in order."""
        self.told = True  # also one that Slurm, which signals every process of a step, has asked before, and ended
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
        """Whether it ended as asked, if only because it did not listen yet."""
        return self.code == ExitCode.STOPPED or self.cut_short

    @property
    def cut_short(self) -> bool:
        """Whether a stop signal ended it, because it did not listen yet."""
        return self.told and -(self.code or 0) in signals.SIGNALS

    @property
    def failed(self) -> bool:
        """Whether it failed by itself."""
        return self.code not in (None, ExitCode.DONE) and not self.stopped and not self.killed


def _die_with(launcher: int) -> None:
    # Runs in the new process: whatever ends the launcher, the kernel then ends the rank.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(128 + signal.SIGKILL)


class OtherNodes(Protocol):
    """What the ranks of this node and those of other nodes tell each other."""

    def warn(self) -> None: ...

    def is_failing(self) -> bool: ...


class Group:
    """The ranks of this node, in one attempt."""

    def __init__(self, ranks: Sequence[Rank], grace: float) -> None:
        self._ranks, self._grace = ranks, grace
        self._failing_since = self._leaving_since = math.inf

    def watch(self, stop: Stop, others: OtherNodes) -> None:
        """Returns when all ranks have ended; sees to it that they do once one has failed or a stop was asked for."""
        while True:
            running = [rank for rank in self._ranks if rank.is_running()]
            if stop.name:
                self._tell()
            if not running:
                return
            overdue = time.monotonic() - self._deadline(others)
            if overdue > SETTLE:
                return  # not even SIGKILL ends a process that the kernel holds, such as in a driver
            if overdue > 0:
                self.kill()
            time.sleep(POLL)

    def _tell(self) -> None:
        self._leaving_since = min(self._leaving_since, time.monotonic())
        for rank in self._ranks:
            if not rank.told:
                rank.tell()

    def _deadline(self, others: OtherNodes) -> float:
        now = time.monotonic()
        if self._failing_since == math.inf and any(rank.failed for rank in self._ranks):
            others.warn()
            self._failing_since = now
        if others.is_failing():
            self._failing_since = min(self._failing_since, now)
        if any(rank.stopped for rank in self._ranks):
            self._leaving_since = min(self._leaving_since, now)
        return min(self._failing_since + SETTLE, self._leaving_since + self._grace)

    def kill(self) -> None:
        for rank in self._ranks:
            if rank.is_running():
                rank.kill()

    def ending(self, folder: Path) -> Ending:
        """How the group ended: its first failure, else whether a rank stopped on request."""
        endings = [self._ending_of(rank, folder / f"{rank.number}.json") for rank in self._ranks]
        # Who was stopped before it listened leaves the others without a peer: no failure either.
        cut_short = any(rank.cut_short for rank in self._ranks)
        failures = [ending for ending in endings if ending.failed and not (cut_short and ending.suspicion == ECHO)]
        return min(failures) if failures else max(endings, key=lambda ending: (ending.code, ending.report))

    def _ending_of(self, rank: Rank, path: Path) -> Ending:
        if rank.code not in (0, None) and (told := _own_ending(path)):
            return told
        if not rank.killed or rank.code not in (None, -signal.SIGKILL):
            return _plain_ending(rank)
        if self._failing_since < math.inf:  # because of another
            report = f"error: rank {rank.number} was killed\nhint: see the logs of the other ranks"
            return Ending(ECHO, rank.ended, 128 + signal.SIGKILL, report)
        late = f"error: rank {rank.number} had not ended {self._grace:g} s after it was asked to stop, and was killed"
        report = f"{late}\nhint: raise --grace, and the grace period of the pod or job with it"
        return Ending(CAUSE, rank.ended, 128 + signal.SIGKILL, report)


def _own_ending(path: Path) -> Ending | None:
    # What the rank wrote, as fusion.command.job does: code, error, hint, time and, of a bug, traceback.
    try:
        told = json.loads(path.read_text())
        code, report = int(told["code"]), f"error: {told['error']}\nhint: {told['hint']}"
        report = told.get("traceback", "") + report
        return Ending(_suspicion(code, report), float(told["time"]), code, report)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain_ending(rank: Rank) -> Ending:
    code = rank.code if rank.code is not None else -signal.SIGKILL
    if code in (ExitCode.DONE, ExitCode.STOPPED):
        return Ending(CAUSE, rank.ended, code, "")
    if rank.stopped:
        report = f"error: rank {rank.number} was asked to stop before it had begun\nhint: run the same command again"
        return Ending(CAUSE, rank.ended, ExitCode.STOPPED, report)
    if code > 0:
        kept = ExitCode.BUG if code == 1 else code  # Python ends with 1 after a traceback
        report = f"error: rank {rank.number} ended with exit code {code}\nhint: see what it wrote above"
        return Ending(_suspicion(kept), rank.ended, kept, report)
    remedy = "give it more memory if that ran out" if code == -signal.SIGKILL else "report it with the log of the run"
    report = f"error: rank {rank.number} was killed by {signal.Signals(-code).name}\nhint: {remedy}"
    return Ending(_suspicion(128 - code), rank.ended, 128 - code, report)


def _suspicion(code: int, report: str = "") -> int:
    # A rank whose peer is gone raises an error that no command expects, or gloo aborts it.
    if code == ExitCode.BUG:
        return ECHO if LOST_PEER.search(report) else MAYBE_ECHO
    return ECHO if code == 128 + signal.SIGABRT else CAUSE
