"""Lists and controls the jobs that run on this machine: this user's launchers, which it finds in /proc.

There are no records of jobs that have ended.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from fusion.errors import DataError, UsageError
from fusion.jobs.schedulers.description import MODULES
from fusion.jobs.schedulers.sent import PREFIX, RUNNING, SentJob, format_time, last_line, read_lines

PROC = Path("/proc")
KIND = "here"  # ids are here/PID
LAUNCHER = ("-m", "fusion.launch")
CLUSTER_VARIABLES = ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST")  # set in processes that a cluster started
START_FIELD = 19  # starttime in /proc/PID/stat, counted after the name in brackets: clock ticks since boot
STREAMS = ("2", "1")  # the log goes to standard error; standard output may be redirected to the same file


class LocalJobs:
    """The jobs on this machine; for the methods see `Jobs`."""

    def all(self, days: int) -> list[SentJob]:
        ids = [int(path.name) for path in PROC.iterdir() if path.name.isdecimal()]
        return [job for pid in ids if (job := _job(pid))]

    def find(self, job_id: str) -> list[SentJob]:
        pid = job_id.removeprefix(f"{KIND}/")
        job = _job(int(pid)) if pid.isdecimal() else None
        if job is None:
            raise DataError(f"no job {job_id} runs on this machine", "`python jobs/pull.py runs` shows what has ended")
        return [job]

    def log(self, job: SentJob, *, node: int, follow: bool) -> Iterator[str]:
        if not job.log:
            message = f"the log of {job.id} goes to a terminal or to another program"
            raise DataError(message, "read it there, or redirect the output to a file when you start the job")
        pid = _pid(job)
        return read_lines(Path(job.log), (lambda: _job(pid) is None) if follow else None)

    def cancel(self, job: SentJob) -> None:
        os.kill(_pid(job), signal.SIGTERM)

    def wait(self, jobs: Sequence[SentJob]) -> int:
        message = f"only the command that started {jobs[0].id} gets its exit code"
        raise UsageError(message, "wait for that command; `python jobs/pull.py runs` shows how trainings ended")


def _pid(job: SentJob) -> int:
    return int(job.id.removeprefix(f"{KIND}/"))


def _job(pid: int) -> SentJob | None:
    """The job of a process; None when the process is not a launcher of this user on this machine."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        name = _name(words)
        if not name or (PROC / str(pid)).stat().st_uid != os.getuid() or _runs_on_cluster(pid):
            return None
        started = format_time(_started(pid))
        log = _log(pid)
    except (OSError, ValueError):  # The process ended while /proc was read.
        return None
    return SentJob(f"{KIND}/{pid}", name, RUNNING, sent=started, started=started, log=log, said=last_line(Path(log)))


def _name(words: Sequence[str]) -> str:
    """The name of the job with this command line; empty when it is not the command line of a launcher."""
    at = next((at for at, pair in enumerate(pairwise(words)) if pair == LAUNCHER), None)
    if at is None:
        return ""
    module = next((word for word in words[at + 2 :] if word.startswith("fusion.")), "")
    names = module.split(".")  # such as fusion.qwen_clip.train
    tasks = {module: task for task, module in MODULES.items()}
    if len(names) != 3 or names[2] not in tasks:
        return ""
    return f"{PREFIX}{tasks[names[2]]}-{names[1].replace('_', '-')}"


def _runs_on_cluster(pid: int) -> bool:
    """Whether Slurm or Kubernetes started the process, so that its job has another id."""
    names = {entry.partition(b"=")[0].decode() for entry in (PROC / str(pid) / "environ").read_bytes().split(b"\0")}
    return not names.isdisjoint(CLUSTER_VARIABLES)


def _started(pid: int) -> float:
    """When the process was started, in seconds since 1970."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[START_FIELD]) / ticks


def _log(pid: int) -> str:
    """The file that the process writes its log to; empty when that is a terminal or a pipe."""
    paths = [PROC / str(pid) / "fd" / stream for stream in STREAMS]
    return next((os.readlink(path) for path in paths if path.exists() and stat.S_ISREG(path.stat().st_mode)), "")
