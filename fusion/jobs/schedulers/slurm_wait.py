"""Waits for jobs on Slurm, and reports how they ended."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from fusion.errors import ConfigError, FusionError, UnreachableError
from fusion.jobs.schedulers.errors import last_error
from fusion.jobs.schedulers.patience import retry
from fusion.jobs.schedulers.slurm import log_in
from fusion.jobs.schedulers.slurm_settings import Cluster

# Exit codes for jobs that Slurm ended: 128 + SIGTERM, and 128 + SIGKILL for out of memory.
ENDED_BY_SLURM = {"CANCELLED": 143, "TIMEOUT": 143, "DEADLINE": 143, "PREEMPTED": 143, "OUT_OF_MEMORY": 137}
REQUEUED = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "FAILED"}  # states after which the job may be back in the queue
OVER = {*ENDED_BY_SLURM, *REQUEUED, "COMPLETED", "REVOKED"}
NO_RECORDS = "accounting storage is disabled"
POLL = 5  # seconds between two requests for the states
SETTLE = 2  # seconds until a final state is checked again: a job that requeues itself looks finished for a moment
RETRY_SECONDS = 300  # seconds for which a sacct that fails is tried again; a restart of slurmdbd takes less


def check_accounting() -> None:
    """Checks, before a job is submitted, that its exit code can be found out afterwards.

    Raises:
        ConfigError: the cluster has no accounting.
        UnreachableError: there is no sacct here, or it does not answer.
    """
    command = ["sacct", "--noheader", "--starttime=now"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UnreachableError("there is no sacct here", "submit from a login node, or leave out --wait") from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        kind: type[FusionError] = ConfigError if NO_RECORDS in said else UnreachableError
        raise kind(f"--wait needs sacct: {said}", "leave out --wait, and use `squeue -u $USER` and the log")


def wait(ids: Sequence[str], cluster: Cluster) -> int:
    """Waits until all jobs have ended; returns the exit code of the first that did not end with 0, or 0.

    Prints changes of their states, and at the end of each job where its log is, and its error.

    Raises:
        UnreachableError: Slurm did not answer for `RETRY_SECONDS`.
    """
    return wait_with_logs(ids, cluster.folder)


def wait_with_logs(ids: Sequence[str], folder: str) -> int:
    """The same as `wait`, for jobs whose logs are in `folder`."""
    shown: dict[str, str] = {}
    while True:
        states = _states(ids)
        for job_id, state in states.items():
            if state != shown.get(job_id):
                print(f"{job_id} {state}", flush=True)
        shown |= states
        if all(_is_over(job_id, shown.get(job_id, "")) for job_id in ids):
            break
        time.sleep(POLL)
    codes = [_report_end(job_id, folder) for job_id in ids]
    return next((code for code in codes if code), 0)


def _states(ids: Sequence[str]) -> dict[str, str]:
    """State of each job that sacct knows."""
    rows = _sacct(ids, "JobID,State")
    return {job_id: state.split()[0] for job_id, state in rows if job_id in ids}


def _is_over(job_id: str, state: str) -> bool:
    """Whether the state is final: the job is not requeued, and has the same state some seconds later."""
    if state not in OVER or (state in REQUEUED and _is_queued(job_id)):
        return False
    time.sleep(SETTLE)
    return _states([job_id]).get(job_id) == state


def _is_queued(job_id: str) -> bool:
    queued = _ask(["squeue", "--noheader", "--me", "--array", "--format=%i"], [job_id])
    return job_id in queued.split()


def _report_end(job_id: str, folder: str) -> int:
    state, code = _ending(job_id)
    log = log_in(folder, job_id)
    print(f"{job_id} {state} with exit code {code}, log: {log}", flush=True)
    if code and (error := logged_error(log)):
        print(error, flush=True)
    return code


def _ending(job_id: str) -> tuple[str, int]:
    *_, (state, exit_code, derived) = _sacct([job_id], "State,ExitCode,DerivedExitCode", is_known=True)
    return state, exit_status(state, exit_code, derived)


def _sacct(ids: Sequence[str], columns: str, is_known: bool = False) -> list[list[str]]:
    """Rows of sacct for these jobs.

    Args:
        is_known: whether sacct has listed the jobs before, so that an empty answer is an error to retry.
    """
    flags = [f"--jobs={','.join(ids)}", "--allocations", "--noheader", "--parsable2", f"--format={columns}"]
    return [line.split("|") for line in _ask(["sacct", *flags], ids, is_known).splitlines()]


def _ask(command: Sequence[str], ids: Sequence[str], is_known: bool = False) -> str:
    """The output of a command of Slurm, which is tried again while it fails, or while `is_known` and it is empty."""

    def ask() -> str:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or (is_known and not done.stdout.strip()):
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            remedy = f"the job goes on; see its state with sacct --jobs={','.join(ids)}"
            raise UnreachableError(f"{command[0]} does not answer: {said}", remedy)
        return done.stdout

    return retry(ask, RETRY_SECONDS, SETTLE)


def exit_status(state: str, exit_code: str, derived: str) -> int:
    """The exit code of a job as a shell would report it.

    Args:
        exit_code: `code:signal` of the job, from sacct.
        derived: `code:signal` of its worst step.

    >>> exit_status("FAILED", "65:0", "65:0"), exit_status("NODE_FAIL", "0:0", "0:0")
    (65, 1)

    The code of a job that Slurm ended follows from the state:

    >>> exit_status("CANCELLED by 0", "0:0", "75:0"), exit_status("OUT_OF_MEMORY", "0:125", "0:125")
    (143, 137)

    A failed step does not count if a later try succeeded:

    >>> exit_status("COMPLETED", "0:0", "69:0")
    0
    """
    code, signal = map(int, exit_code.split(":"))
    if state == "COMPLETED" or code:
        return code
    if by_slurm := ENDED_BY_SLURM.get(state.split()[0]):
        return by_slurm
    if signal:
        return 128 + signal
    return int(derived.split(":")[0]) or 1


def logged_error(log: Path) -> str:
    """The error in the log of any of a job's nodes; empty when there is none.

    Args:
        log: the log of its first node.
    """
    nodes = sorted(log.parent.glob(log.name.replace("_0_log", "_*_log")))
    return next(filter(None, (last_error(node.read_text(errors="replace")) for node in nodes)), "")
