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
from jobs.clusters import slurm_settings, slurm_wait
from jobs.clusters.sent import (
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
from jobs.clusters.slurm import log_in

STATES = {
    "PENDING": WAITING, "REQUEUED": WAITING, "CONFIGURING": WAITING, "SUSPENDED": WAITING, "PREEMPTED": WAITING,
    "RUNNING": RUNNING, "COMPLETING": RUNNING, "COMPLETED": FINISHED, "CANCELLED": CANCELLED,
}  # fmt: skip
SACCT = "JobID,JobName,State,ExitCode,DerivedExitCode,Submit,Start,End,Restarts,NodeList,SubmitLine"
SQUEUE = "%i|%j|%T|0:0|0:0|%V|%S||0|%N|"  # as many columns; it knows only jobs that have not ended
# How submitit calls sbatch: by a script in the folder of the logs.
FOLDER = re.compile(r"\bsbatch (/.*)/submission_file_\w+\.sh")
ARRAY = re.compile(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]")  # tasks that wait are one row
NOWHERE = ("", "None assigned", "(null)")


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
        reasons = _reasons(of_squeue)
        try:
            rows = _run(["sacct", "--allocations", "--noheader", "--parsable2", f"--format={SACCT}", *of_sacct])
        except ConfigError:  # no accounting: what has ended is not known
            rows = _run(["squeue", "--noheader", "--array", f"--format={SQUEUE}", *of_squeue])
        found = [self._job(row.split("|", 10), reasons) for row in rows.splitlines()]
        return [one for job in found for one in _tasks(job, self)]

    def _job(self, row: Sequence[str], reasons: dict[str, str]) -> Sent:
        job_id, name, told, code, derived, sent, started, ended, restarts, nodes, submitted = row
        word = told.split()[0]
        state = STATES.get(word, FAILED)
        why = [word] if state not in (RUNNING, FINISHED) else []
        why += [reasons[job_id]] if state == WAITING and job_id in reasons else []
        why += [f"on {nodes}"] if state == RUNNING and nodes not in NOWHERE else []
        why += [f"requeued {restarts} times"] if restarts not in ("", "0") else []
        is_over = state not in (WAITING, RUNNING)
        status = slurm_wait.exit_status(told, code, derived) if is_over else None
        log = self._path_of(job_id, submitted)
        # Of a job that waits Slurm says when it may start.
        times = _time(sent), "" if state == WAITING else _time(started), _time(ended)
        return Sent(job_id, name, state, ", ".join(why), status, *times, log)

    def _path_of(self, job_id: str, submitted: str) -> str:
        found = FOLDER.search(submitted)
        return str(log_in(found[1] if found else self._folder, job_id))


def _tasks(job: Sent, of: SlurmJobs) -> list[Sent]:
    """The job, or each of the tasks of an array that wait."""
    found = ARRAY.fullmatch(job.id)
    if not found:
        return [job]
    spans = [span.partition("-") for span in found[2].split(",")]
    numbers = [number for low, _, high in spans for number in range(int(low), int(high or low) + 1)]
    folder = str(Path(job.log).parent)
    ids = [f"{found[1]}_{number}" for number in numbers]
    return [replace(job, id=one, log=str(log_in(folder, one))) for one in ids]


def _time(text: str) -> str:
    return moment(int(text)) if text.isdecimal() else ""


def _reasons(which: list[str]) -> dict[str, str]:
    """Why jobs wait, by their ids; squeue fails where all have ended."""
    try:
        rows = _run(["squeue", "--noheader", "--format=%i|%r", *which])
    except UnreachableError:
        return {}
    found = (row.partition("|") for row in rows.splitlines())
    return {job_id: reason for job_id, _, reason in found}


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
