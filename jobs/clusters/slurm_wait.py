"""Follows jobs of Slurm to their end, and tells how they ended."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from fusion.errors import ConfigError, UnreachableError
from jobs.clusters.errors import last_error
from jobs.clusters.slurm import logs
from jobs.clusters.slurm_settings import Cluster

ENDED_BY_SLURM = {"CANCELLED": 143, "TIMEOUT": 143, "DEADLINE": 143, "PREEMPTED": 143, "OUT_OF_MEMORY": 137}
OVER = {*ENDED_BY_SLURM, "COMPLETED", "FAILED", "NODE_FAIL", "BOOT_FAIL", "REVOKED"} - {"PREEMPTED"}
POLL = 5  # seconds between two looks at the states
SETTLE = 2  # seconds: a job that requeues itself looks finished for a moment, so a final state is looked at twice
PATIENCE = 300  # seconds for which a sacct that fails is asked again


def check_accounting() -> None:
    """Finds out before a job is sent whether its end can be known.

    Raises:
        ConfigError: the cluster keeps no record of how jobs ended.
        UnreachableError: there is no sacct here.
    """
    command = ["sacct", "--noheader", "--starttime=now"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UnreachableError("there is no sacct here", "submit from a login node, or leave out --wait") from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise ConfigError(f"--wait needs sacct: {said}", "leave out --wait, and look at squeue and at the log")


def wait(ids: Sequence[str], cluster: Cluster) -> int:
    """Exit code of the first of these jobs that did not end with 0; tells where each log is, and why it failed."""
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
    codes = [_conclude(job_id, cluster) for job_id in ids]
    return next((code for code in codes if code), 0)


def _states(ids: Sequence[str]) -> dict[str, str]:
    """State of each job that sacct knows and answers for."""
    command = ["sacct", f"--jobs={','.join(ids)}", "--allocations", "--noheader", "--parsable2", "--format=JobID,State"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {job_id: state.split()[0] for job_id, state in rows if job_id in ids}


def _is_over(job_id: str, state: str) -> bool:
    if state == "PREEMPTED":  # for good, unless Slurm has put it back into its queue
        return not _is_queued(job_id)
    if state not in OVER:
        return False
    time.sleep(SETTLE)
    return _states([job_id]).get(job_id) == state


def _is_queued(job_id: str) -> bool:
    command = ["squeue", "--noheader", f"--jobs={job_id}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return bool(done.stdout.strip())


def _conclude(job_id: str, cluster: Cluster) -> int:
    state, code = _ending(job_id)
    log = logs(cluster, job_id)
    print(f"{job_id} {state} with exit code {code}, log: {log}", flush=True)
    if code and (error := _told(log)):
        print(error, flush=True)
    return code


def _ending(job_id: str) -> tuple[str, int]:
    command = ["sacct", f"--jobs={job_id}", "--allocations", "--noheader", "--parsable2"]
    command.append("--format=State,ExitCode,DerivedExitCode")
    deadline = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if not done.returncode and done.stdout.strip():
            state, exit_code, derived = done.stdout.strip().splitlines()[-1].split("|")
            return state, exit_status(state, exit_code, derived)
        if time.monotonic() > deadline:
            said = done.stderr.strip() or "nothing"
            raise UnreachableError(f"sacct does not say how {job_id} ended: {said}", f"ask again: sacct -j {job_id}")
        time.sleep(SETTLE)


def exit_status(state: str, exit_code: str, derived: str) -> int:
    """What a shell would have seen, from sacct's `code:signal` of the job and of its worst step.

    >>> exit_status("FAILED", "65:0", "65:0"), exit_status("NODE_FAIL", "0:0", "0:0")
    (65, 1)

    A job that Slurm ended has no code of its own:

    >>> exit_status("CANCELLED by 0", "0:0", "75:0"), exit_status("OUT_OF_MEMORY", "0:125", "0:125")
    (143, 137)

    A step that failed and was tried again with success counts for nothing:

    >>> exit_status("COMPLETED", "0:0", "69:0")
    0
    """
    code, signal = map(int, exit_code.split(":"))
    if state == "COMPLETED" or code:
        return code
    by_slurm = ENDED_BY_SLURM.get(state.split()[0])
    return by_slurm or (128 + signal if signal else int(derived.split(":")[0]) or 1)


def _told(log: Path) -> str:
    nodes = sorted(log.parent.glob(log.name.replace("_0_log", "_*_log")))
    return next(filter(None, (last_error(node.read_text(errors="replace")) for node in nodes)), "")
