"""Jobs on this machine, one after the other, each the very command that a cluster would run."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from fusion import signals
from fusion.errors import ExitCode, UsageError
from jobs.schedulers.description import Job


def render(jobs: Sequence[Job]) -> str:
    return "".join(f"{shlex.join(job.command())}\n" for job in jobs)


def run(jobs: Sequence[Job]) -> int:
    """Exit code of the first job that does not end with 0, and 0 when there is none; no job is started after it.

    Asked to stop while jobs are left, it starts none of them, and ends with 75 where the running one ended with 0.

    Raises:
        UsageError: a job for several nodes.
    """
    check(jobs)
    stops: list[int] = []
    for job in jobs:
        code = _run(job.command(sys.executable), stops)
        if code or (stops and job is not jobs[-1]):
            return code or ExitCode.STOPPED
    return ExitCode.DONE


def check(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.nodes > 1:
            message = f"--nodes is {job.nodes}, and --cluster local is one node"
            raise UsageError(message, "leave out --nodes, or choose --cluster slurm or k8s")


def _run(command: Sequence[str], stops: list[int]) -> int:
    running: list[subprocess.Popen[bytes]] = []
    n_stops = len(stops)

    def forward(number: int, _: FrameType | None) -> None:
        stops.append(number)
        for process in running:
            process.send_signal(number)

    before = signals.catch(forward)
    try:
        process = subprocess.Popen(command)
        running.append(process)
        if len(stops) > n_stops:  # came before the process was there to forward it to
            process.send_signal(stops[-1])
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if -code in stops:  # it had no handler yet, and so nothing to commit
        return ExitCode.STOPPED
    return code if code >= 0 else 128 - code
