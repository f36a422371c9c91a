"""Jobs that run on this machine: launchers of this user, as /proc has them. Of what has ended it knows nothing."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from fusion.errors import DataError, UsageError
from jobs.schedulers.description import MODULES
from jobs.schedulers.sent import PREFIX, RUNNING, Sent, last_line, lines, moment

PROC = Path("/proc")
KIND = "here"
LAUNCHER = ("-m", "fusion.launch")
ELSEWHERE = ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST")  # in the environment of what belongs to a cluster
START = 19  # of the fields behind the name in /proc/PID/stat: ticks from the machine's start to the process's
STREAMS = ("2", "1")  # the log goes to standard error


class LocalJobs:
    def all(self, days: int) -> list[Sent]:
        ids = [int(path.name) for path in PROC.iterdir() if path.name.isdecimal()]
        return [job for pid in ids if (job := _job(pid))]

    def find(self, job_id: str) -> list[Sent]:
        pid = job_id.removeprefix(f"{KIND}/")
        job = _job(int(pid)) if pid.isdecimal() else None
        if job is None:
            raise DataError(f"no job {job_id} runs on this machine", "`python jobs/pull.py runs` shows what has ended")
        return [job]

    def log(self, job: Sent, *, node: int, follow: bool) -> Iterator[str]:
        if not job.log:
            message = f"the log of {job.id} goes to a terminal or to another program"
            raise DataError(message, "look there, or send its output to a file when you start it")
        pid = _pid(job)
        return lines(Path(job.log), (lambda: _job(pid) is None) if follow else None)

    def cancel(self, job: Sent) -> None:
        os.kill(_pid(job), signal.SIGTERM)

    def wait(self, jobs: Sequence[Sent]) -> int:
        message = f"how {jobs[0].id} ends, only the command that started it is told"
        raise UsageError(message, "look there; `python jobs/pull.py runs` shows how trainings ended")


def _pid(job: Sent) -> int:
    return int(job.id.removeprefix(f"{KIND}/"))


def _job(pid: int) -> Sent | None:
    """The job of a process; None where it is none, or belongs to another user."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        name = _name(words)
        if not name or (PROC / str(pid)).stat().st_uid != os.getuid() or _is_elsewhere(pid):
            return None
        started = moment(_started(pid))
        log = _log(pid)
    except (OSError, ValueError):  # it has ended meanwhile
        return None
    return Sent(f"{KIND}/{pid}", name, RUNNING, sent=started, started=started, log=log, said=last_line(Path(log)))


def _name(words: Sequence[str]) -> str:
    """What a job with this command is called; empty where it is no launcher of one."""
    at = next((at for at, pair in enumerate(pairwise(words)) if pair == LAUNCHER), None)
    modules = [word.split(".") for word in words[at + 2 :] if word.startswith("fusion.")] if at is not None else []
    tasks = {module: task for task, module in MODULES.items()}
    if not modules or len(modules[0]) != 3 or modules[0][2] not in tasks:
        return ""
    return f"{PREFIX}{tasks[modules[0][2]]}-{modules[0][1].replace('_', '-')}"


def _is_elsewhere(pid: int) -> bool:
    names = {entry.partition(b"=")[0].decode() for entry in (PROC / str(pid) / "environ").read_bytes().split(b"\0")}
    return not names.isdisjoint(ELSEWHERE)


def _started(pid: int) -> float:
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[START]) / ticks


def _log(pid: int) -> str:
    """The file that it writes its log to; empty for a terminal or a pipe."""
    paths = [PROC / str(pid) / "fd" / stream for stream in STREAMS]
    return next((os.readlink(path) for path in paths if path.exists() and stat.S_ISREG(path.stat().st_mode)), "")
