"""Runs jobs on this machine, one after the other, with the same command that a cluster would run."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from fusion import signals
from fusion.errors import ExitCode, UsageError
from fusion.jobs.schedulers.description import Job


def render(jobs: Sequence[Job]) -> str:
    return "".join(f"{shlex.join(job.command())}\n" for job in jobs)


def run(jobs: Sequence[Job]) -> int:
    """Runs the jobs; returns the exit code of the first that does not end with 0, and starts no job after it.

    After a stop signal no further job is started; the result is then 75 even if the running job ended with 0.

    Raises:
        UsageError: a job asks for several nodes.
    """
    check(jobs)
    stops: list[int] = []
    for job in jobs:
        code = _run(job.command(sys.executable), stops)
        if code or (stops and job is not jobs[-1]):
            return code or ExitCode.STOPPED
    return ExitCode.DONE


def check(jobs: Sequence[Job]) -> None:
    """Raises UsageError when a job asks for several nodes."""
    for job in jobs:
        if job.nodes > 1:
            message = f"--nodes is {job.nodes}, and --cluster local is one node"
            raise UsageError(message, "leave out --nodes, or choose --cluster slurm or k8s")


def _run(command: Sequence[str], stops: list[int]) -> int:
    """Runs a command and forwards stop signals to it; returns its exit code.

    Args:
        stops: the signals that came so far; those that come meanwhile are added.
    """
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
        if len(stops) > n_stops:  # a signal that came before there was a process to forward it to
            process.send_signal(stops[-1])
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if -code in stops:  # The signal ended it before it had a handler. It had not begun to work, so nothing is lost.
        return ExitCode.STOPPED
    return code if code >= 0 else 128 - code
