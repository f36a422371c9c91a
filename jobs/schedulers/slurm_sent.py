"""Jobs that were sent to Slurm, as its accounting and its queue have them; they are known by name and owner."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from fusion.errors import ConfigError, DataError, UnreachableError
from jobs.schedulers import slurm_settings, slurm_wait
from jobs.schedulers.sent import (
    CANCELLED,
    FAILED,
    FINISHED,
    PREFIX,
    RUNNING,
    WAITING,
    Sent,
    last_line,
    lines,
    moment,
)
from jobs.schedulers.slurm import log_in

STATES = {
    "PENDING": WAITING, "REQUEUED": WAITING, "CONFIGURING": WAITING, "SUSPENDED": WAITING, "PREEMPTED": WAITING,
    "RUNNING": RUNNING, "COMPLETING": RUNNING, "COMPLETED": FINISHED, "CANCELLED": CANCELLED,
}  # fmt: skip
SACCT = "JobID,JobName,State,ExitCode,DerivedExitCode,Submit,Start,End,NodeList,SubmitLine"
SQUEUE = "%i|%j|%T|0:0|0:0|%V|%S||%N|%r"  # the same of jobs that have not ended, and at last why they wait
N_COLUMNS = 10
# How submitit calls sbatch: by a script in the folder of the logs.
FOLDER = re.compile(r"\bsbatch (/.*)/\.?submission_file_\w+\.sh")
ARRAY = re.compile(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]")  # tasks that wait are one row
NOWHERE = ("", "None assigned", "(null)")
NO_SUCH_JOB = "Invalid job id"


class SlurmJobs:
    """Jobs of this user.

    Args:
        settings: file with the folder of the logs, for where Slurm keeps no record of it.
    """

    def __init__(self, settings: Path) -> None:
        self._settings = settings

    def all(self, days: int) -> list[Sent]:
        user = f"--user={os.getuid()}"
        found = self._jobs([user, f"--starttime=now-{days}days"], [user])
        return [job for job in found if job.name.startswith(PREFIX)]

    def find(self, job_id: str) -> list[Sent]:
        found = self._jobs([f"--jobs={job_id}"], [f"--jobs={job_id}"])
        if not found:
            raise DataError(f"Slurm knows no job {job_id}", "`python jobs/control.py list` shows those that it knows")
        return [replace(job, said=_said(job)) for job in found]

    def log(self, job: Sent, *, node: int, follow: bool) -> Iterator[str]:
        path = Path(job.log)
        path = path.with_name(path.name.replace("_0_log", f"_{node}_log"))
        return lines(path, (lambda: all(one.is_over for one in self.find(job.id))) if follow else None)

    def cancel(self, job: Sent) -> None:
        _run(["scancel", job.id])

    def wait(self, jobs: Sequence[Sent]) -> int:
        slurm_wait.check_accounting()
        return slurm_wait.wait_in([job.id for job in jobs], str(Path(jobs[0].log).parent))

    @cached_property
    def _folder(self) -> str:
        return slurm_settings.read(self._settings, "train").folder

    def _jobs(self, of_sacct: list[str], of_squeue: list[str]) -> list[Sent]:
        """What the records say, and of jobs that have not ended the queue: records come seconds late."""
        tries: dict[str, list[list[str]]] = {}
        recorded = _recorded(of_sacct)
        for row in recorded or []:
            for job_id in _ids(row[0]):
                tries.setdefault(job_id, []).append([job_id, *row[1:]])
        queued = _queued(of_squeue, must_answer=recorded is None)
        return [self._job(tries.get(job_id, []), queued.get(job_id)) for job_id in {**tries, **queued}]

    def _job(self, tries: Sequence[list[str]], queued: list[str] | None) -> Sent:
        job_id, name, told, code, derived, _, started, ended, nodes, reason = queued or tries[-1]
        first, submitted = (tries or [queued or []])[0][5], tries[0][9] if tries else ""
        word = told.split()[0]
        state = STATES.get(word, FAILED)
        why = [word] if state not in (RUNNING, FINISHED) else []
        why += [reason] if queued and state == WAITING else []
        why += [f"on {nodes}"] if state == RUNNING and nodes not in NOWHERE else []
        why += [f"requeued {len(tries) - 1} times"] if len(tries) > 1 else []
        status = None if state in (WAITING, RUNNING) else slurm_wait.exit_status(told, code, derived)
        # Of a job that waits Slurm says when it may start.
        times = _time(first), "" if state == WAITING else _time(started), _time(ended)
        return Sent(job_id, name, state, ", ".join(why), status, *times, self._path_of(job_id, submitted))

    def _path_of(self, job_id: str, submitted: str) -> str:
        found = FOLDER.search(submitted)
        return str(log_in(found[1] if found else self._folder, job_id))


def _recorded(which: list[str]) -> list[list[str]] | None:
    """Rows of sacct, of a requeued job one for each try; None where Slurm keeps no record of jobs that have ended."""
    flags = ["--allocations", "--duplicates", "--noheader", "--parsable2", f"--format={SACCT}"]
    try:
        return _rows(_run(["sacct", *flags, *which]))
    except ConfigError:
        return None


def _queued(which: list[str], must_answer: bool) -> dict[str, list[str]]:
    """Rows of squeue by the ids of jobs that have not ended; it fails where it is asked for a job that has."""
    try:
        rows = _rows(_run(["squeue", "--noheader", "--array", f"--format={SQUEUE}", *which]))
    except UnreachableError as error:
        if must_answer and NO_SUCH_JOB not in error.message:
            raise
        return {}
    return {row[0]: row for row in rows if STATES.get(row[2]) in (WAITING, RUNNING)}


def _rows(said: str) -> list[list[str]]:
    return [line.split("|", N_COLUMNS - 1) for line in said.splitlines()]


def _ids(job_id: str) -> list[str]:
    """The id, or those of the tasks of an array that wait.

    >>> _ids("7_[0,2-3%1]"), _ids("8")
    (['7_0', '7_2', '7_3'], ['8'])
    """
    found = ARRAY.fullmatch(job_id)
    if not found:
        return [job_id]
    spans = [span.partition("-") for span in found[2].split(",")]
    return [f"{found[1]}_{number}" for low, _, high in spans for number in range(int(low), int(high or low) + 1)]


def _time(text: str) -> str:
    return moment(int(text)) if text.isdecimal() else ""


def _said(job: Sent) -> str:
    log = Path(job.log)
    return (slurm_wait.told(log) if job.code else "") or last_line(log)


def _run(command: Sequence[str]) -> str:
    """What a command of Slurm says.

    Raises:
        UnreachableError: there is no Slurm here, or it does not answer; ConfigError: it keeps no record of ended jobs.
    """
    try:
        environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise UnreachableError(f"there is no {command[0]} here", "ask from a login node of the cluster") from error
    if not done.returncode:
        return done.stdout
    said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
    if slurm_wait.NO_RECORDS in done.stderr + done.stdout:
        raise ConfigError(f"{command[0]}: {said}", "look at squeue")
    raise UnreachableError(f"{command[0]} does not answer: {said}", "see `sinfo`, and ask again")
