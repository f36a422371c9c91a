"""Lists and controls this user's jobs on Slurm, as its accounting (sacct) and its queue (squeue) show them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from fusion.errors import ConfigError, DataError, UnreachableError
from fusion.jobs.schedulers import slurm_settings, slurm_wait
from fusion.jobs.schedulers.sent import (
    CANCELLED,
    FAILED,
    FINISHED,
    PREFIX,
    RUNNING,
    WAITING,
    SentJob,
    format_time,
    last_line,
    read_lines,
)
from fusion.jobs.schedulers.slurm import log_in

STATES = {
    "PENDING": WAITING, "REQUEUED": WAITING, "CONFIGURING": WAITING, "SUSPENDED": WAITING, "PREEMPTED": WAITING,
    "RUNNING": RUNNING, "COMPLETING": RUNNING, "COMPLETED": FINISHED, "CANCELLED": CANCELLED,
}  # fmt: skip
SACCT = "JobID,JobName,State,ExitCode,DerivedExitCode,Submit,Start,End,NodeList,SubmitLine"
# The same columns for jobs that have not ended, which have no exit codes; the last column is why they wait.
SQUEUE = "%i|%j|%T|0:0|0:0|%V|%S||%N|%r"
N_COLUMNS = 10
SUBMIT, SUBMIT_LINE = 5, 9  # columns with the time and the command line of the submission; squeue has no SubmitLine
# submitit calls sbatch with a script in the folder of the logs, which is how the folder is found.
FOLDER = re.compile(r"\bsbatch (/.*)/\.?submission_file_\w+\.sh")
ARRAY = re.compile(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]")  # sacct shows all waiting tasks of an array in one row
NOWHERE = ("", "None assigned", "(null)")
NO_SUCH_JOB = "Invalid job id"


class SlurmJobs:
    """This user's jobs on Slurm; for the methods see `Jobs`.

    Args:
        settings: file with the settings of the cluster. It names the folder of the logs of jobs for which Slurm has no
            record of how they were submitted.
    """

    def __init__(self, settings: Path) -> None:
        self._settings = settings

    def all(self, days: int) -> list[SentJob]:
        user = f"--user={os.getuid()}"
        found = self._jobs([user, f"--starttime=now-{days}days"], [user])
        return [job for job in found if job.name.startswith(PREFIX)]

    def find(self, job_id: str) -> list[SentJob]:
        found = self._jobs([f"--jobs={job_id}"], [f"--jobs={job_id}"])
        if not found:
            raise DataError(f"Slurm knows no job {job_id}", "`python jobs/control.py list` shows the jobs it knows")
        return [replace(job, said=_said(job)) for job in found]

    def log(self, job: SentJob, *, node: int, follow: bool) -> Iterator[str]:
        path = Path(job.log)
        path = path.with_name(path.name.replace("_0_log", f"_{node}_log"))
        return read_lines(path, (lambda: all(one.is_over for one in self.find(job.id))) if follow else None)

    def cancel(self, job: SentJob) -> None:
        _run(["scancel", job.id])

    def wait(self, jobs: Sequence[SentJob]) -> int:
        slurm_wait.check_accounting()
        return slurm_wait.wait_with_logs([job.id for job in jobs], str(Path(jobs[0].log).parent))

    @cached_property
    def _folder(self) -> str:
        return slurm_settings.read(self._settings, "train").folder

    def _jobs(self, of_sacct: list[str], of_squeue: list[str]) -> list[SentJob]:
        """The jobs that sacct and squeue list. Where both list a job, squeue counts: sacct is updated seconds later.

        Args:
            of_sacct: flags that select the jobs, for sacct.
            of_squeue: the same for squeue.
        """
        tries: dict[str, list[list[str]]] = {}
        recorded = _recorded(of_sacct)
        for row in recorded or []:
            for job_id in _ids(row[0]):
                tries.setdefault(job_id, []).append([job_id, *row[1:]])
        queued = _queued(of_squeue, must_answer=recorded is None)
        return [self._job(tries.get(job_id, []), queued.get(job_id)) for job_id in {**tries, **queued}]

    def _job(self, tries: Sequence[list[str]], queued: list[str] | None) -> SentJob:
        """A job from its rows.

        Args:
            tries: rows of sacct, one per start of a requeued job, the oldest first.
            queued: the row of squeue; None for a job that has ended.
        """
        newest = queued or tries[-1]
        oldest = tries[0] if tries else newest
        job_id, name, state_text, code, derived, _, started, ended, nodes, reason = newest
        word = state_text.split()[0]
        state = STATES.get(word, FAILED)
        why = []
        if state not in (RUNNING, FINISHED):
            why.append(word)
        if queued and state == WAITING:
            why.append(reason)
        if state == RUNNING and nodes not in NOWHERE:
            why.append(f"on {nodes}")
        if len(tries) > 1:
            why.append(f"requeued {len(tries) - 1} times")
        return SentJob(
            job_id,
            name,
            state,
            ", ".join(why),
            code=None if state in (WAITING, RUNNING) else slurm_wait.exit_status(state_text, code, derived),
            sent=_time(oldest[SUBMIT]),
            # For a waiting job, Slurm gives the expected start.
            started="" if state == WAITING else _time(started),
            ended=_time(ended),
            log=self._path_of(job_id, oldest[SUBMIT_LINE] if tries else ""),
        )

    def _path_of(self, job_id: str, submitted: str) -> str:
        """The path of a job's log, from the command line of sbatch if Slurm has it, else from the settings."""
        found = FOLDER.search(submitted)
        return str(log_in(found[1] if found else self._folder, job_id))


def _recorded(which: list[str]) -> list[list[str]] | None:
    """Rows of sacct, several for a requeued job; None on clusters without accounting."""
    flags = ["--allocations", "--duplicates", "--noheader", "--parsable2", f"--format={SACCT}"]
    try:
        return _rows(_run(["sacct", *flags, *which]))
    except ConfigError:
        return None


def _queued(which: list[str], must_answer: bool) -> dict[str, list[str]]:
    """Rows of squeue for the jobs that have not ended, by id.

    Args:
        must_answer: whether to raise an error when squeue fails. It also fails when asked for a job that has ended,
            which is not an error.
    """
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
    """The ids in a row of sacct: one, or those of all waiting tasks of an array.

    >>> _ids("7_[0,2-3%1]"), _ids("8")
    (['7_0', '7_2', '7_3'], ['8'])
    """
    found = ARRAY.fullmatch(job_id)
    if not found:
        return [job_id]
    spans = [span.partition("-") for span in found[2].split(",")]
    return [f"{found[1]}_{number}" for low, _, high in spans for number in range(int(low), int(high or low) + 1)]


def _time(text: str) -> str:
    """A time that Slurm printed as seconds since 1970; empty for words such as Unknown and N/A."""
    return format_time(int(text)) if text.isdecimal() else ""


def _said(job: SentJob) -> str:
    """For a failed job its error, for others the last line of the log."""
    log = Path(job.log)
    return (slurm_wait.logged_error(log) if job.code else "") or last_line(log)


def _run(command: Sequence[str]) -> str:
    """Runs a command of Slurm, with times as seconds since 1970; returns its output.

    Raises:
        UnreachableError: there is no Slurm here, or it does not answer.
        ConfigError: the cluster has no accounting.
    """
    try:
        environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise UnreachableError(f"there is no {command[0]} here", "run this on a login node of the cluster") from error
    if not done.returncode:
        return done.stdout
    said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
    if slurm_wait.NO_RECORDS in done.stderr + done.stdout:
        raise ConfigError(f"{command[0]}: {said}", "use `squeue -u $USER`")
    raise UnreachableError(f"{command[0]} does not answer: {said}", "see `sinfo`, and try again")
