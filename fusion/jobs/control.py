"""Lists jobs on Slurm, on Kubernetes and on this machine; shows, follows, awaits or cancels them.

    python jobs/control.py list                    # of the last week, on all clusters
    python jobs/control.py status 1234             # Slurm; or 1234_0 of an array
    python jobs/control.py logs --follow job/NAME  # Kubernetes; or jobset/NAME
    python jobs/control.py cancel here/4711        # here; the launcher's process id
    python jobs/control.py wait 1234               # ends with the job's exit code

All information comes from the clusters. There is no local record of jobs, so that the command works on every machine
that reaches the cluster.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from fusion import storage
from fusion.command import guarded
from fusion.command.exit import report
from fusion.errors import ExitCode, FusionError, Parser, UsageError
from fusion.jobs.arguments import checkout, refuse_empty
from fusion.jobs.schedulers import kubernetes_settings
from fusion.jobs.schedulers.kubectl import Kubectl
from fusion.jobs.schedulers.kubernetes_sent import KubernetesJobs
from fusion.jobs.schedulers.local_sent import KIND, LocalJobs
from fusion.jobs.schedulers.sent import WAITING, Jobs, SentJob
from fusion.jobs.schedulers.slurm_sent import SlurmJobs
from fusion.terminal import tables
from fusion.terminal.escapes import visible
from fusion.terminal.streams import unfailing

ROOT = checkout()
PROGRAMS = {"slurm": "squeue", "k8s": "kubectl", "local": "sh"}  # programs that show that a cluster is available
SLURM_ID = re.compile(r"\d+(_\d+)?")
MINUTE = len("2026-01-02T03:04")  # times are shown to the minute


def _list(given: argparse.Namespace) -> ExitCode:
    """Lists jobs. Without --cluster, an error of one cluster is printed after the jobs of the others."""
    clusters = [given.cluster] if given.cluster else [name for name in PROGRAMS if _is_available(name)]
    found, failed = [], []
    for cluster in clusters:
        try:
            found += _jobs_of(cluster, given).all(given.days)
        except FusionError as error:
            if given.cluster:
                raise
            failed.append(error)
    found.sort(key=lambda job: job.sent, reverse=True)
    if given.json:
        _print_json(found)
    else:
        _print_table(found, given.days)
    for failure in failed:
        report(failure)
    return failed[0].code if failed and not found else ExitCode.DONE


def _status(given: argparse.Namespace) -> ExitCode:
    found = [job for job_id in given.ids for job in _jobs_with(job_id, given).find(job_id)]
    if given.json:
        _print_json(found)
        return ExitCode.DONE
    for job in found:
        print(_described(job), flush=True)
    return ExitCode.DONE


def _logs(given: argparse.Namespace) -> ExitCode:
    jobs = _jobs_with(given.id, given)
    found = jobs.find(given.id)
    if len(found) > 1:
        ids = ", ".join(job.id for job in found)
        raise UsageError(f"{given.id} is an array of {len(found)} jobs: {ids}", f"give one of these ids: {found[0].id}")
    if given.follow and found[0].state == WAITING:
        print(visible(f"{found[0].id} waits ({found[0].why}); its log follows"), file=sys.stderr, flush=True)
    for line in jobs.log(found[0], node=given.node, follow=given.follow):
        # Control characters are escaped, except tabs.
        print("\t".join(map(visible, line.rstrip("\r").split("\t"))), flush=True)
    return ExitCode.DONE


def _cancel(given: argparse.Namespace) -> ExitCode:
    for job_id in given.ids:
        jobs = _jobs_with(job_id, given)
        for job in jobs.find(job_id):
            if job.is_over:
                print(f"{job.id} is {job.state} already")
                continue
            jobs.cancel(job)
            print(
                f"{job.id} is asked to stop; submit the same job again to resume it from the last committed checkpoint"
            )
    return ExitCode.DONE


def _wait(given: argparse.Namespace) -> int:
    codes = []
    for job_id in given.ids:
        jobs = _jobs_with(job_id, given)
        codes.append(jobs.wait(jobs.find(job_id)))
    return next((code for code in codes if code), ExitCode.DONE)


def _jobs_with(job_id: str, given: argparse.Namespace) -> Jobs:
    """The jobs of the cluster that this id belongs to, which its form shows."""
    if SLURM_ID.fullmatch(job_id):
        return _jobs_of("slurm", given)
    return _jobs_of("local" if job_id.startswith(f"{KIND}/") else "k8s", given)


def _is_available(cluster: str) -> bool:
    """Whether this machine seems to reach such a cluster: it has the program, and for kubectl a context or a pod."""
    if not shutil.which(PROGRAMS[cluster]):
        return False
    return cluster != "k8s" or bool(Kubectl.now(None).context or "KUBERNETES_SERVICE_HOST" in os.environ)


def _jobs_of(cluster: str, given: argparse.Namespace) -> Jobs:
    if cluster == "local":
        return LocalJobs()
    if cluster == "slurm":
        return SlurmJobs(given.settings or ROOT / "slurm" / "cluster.toml")
    settings = kubernetes_settings.read(given.settings or ROOT / "k8s" / "cluster.toml")
    return KubernetesJobs(Kubectl.now(given.namespace or settings.namespace, given.context or settings.context))


def _print_table(found: Sequence[SentJob], days: int) -> None:
    if not found:
        print(f"no jobs of the last {days} days")
        return
    table = tables.table(f"Jobs of the last {days} days", "id", "state", "code", "sent (UTC)", "name", "")
    for job in found:
        code = "-" if job.code is None else str(job.code)
        # On Kubernetes the id contains the name, which is left out to keep the table narrow.
        name = "" if job.id.endswith(f"/{job.name}") else job.name
        tables.add(table, job.id, job.state, code, job.sent[:MINUTE].replace("T", " "), name, job.why)
    tables.show(table)


def _described(job: SentJob) -> str:
    """All that is known of a job, in several lines, with control characters from the cluster escaped."""
    state = job.state + (f" with exit code {job.code}" if job.code is not None else "")
    why = f" ({job.why})" if job.why else ""
    facts = {"sent": job.sent, "started": job.started, "ended": job.ended, "log": job.log}
    lines = [visible(f"{job.id:<8} {job.name}: {state}{why}")]
    lines += [visible(f"  {name:<8} {value}") for name, value in facts.items() if value]
    return "\n".join([*lines, *(f"  {visible(line)}" for line in job.said.splitlines())])


def _print_json(found: Iterable[SentJob]) -> None:
    sys.stdout.write(storage.as_json([asdict(job) for job in found]).decode())


def _parser() -> Parser:
    parser = Parser("python jobs/control.py", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def command(name: str, job: Callable[[argparse.Namespace], int], text: str) -> Parser:
        made: Parser = commands.add_parser(name, help=text, description=f"{text}.")
        made.set_defaults(job=job, parser=made)
        made.add_argument("--settings", type=Path, metavar="FILE",
            help="settings of the cluster (default: slurm/cluster.toml, k8s/cluster.toml)")  # fmt: skip
        made.add_argument("--context", metavar="NAME", help="context of the kubeconfig (default: as in "
            "k8s/cluster.toml, else the current one)")  # fmt: skip
        made.add_argument("--namespace", metavar="NAME", help="namespace of Kubernetes (default: as in "
            "k8s/cluster.toml, else that of the context)")  # fmt: skip
        return made

    _add_commands(command)
    return parser


def _add_commands(command: Callable[..., Parser]) -> None:
    listing = command("list", _list, "lists submitted jobs, newest first")
    listing.add_argument("--cluster", choices=list(PROGRAMS), help="list the jobs of this cluster alone (default: all "
        "that this machine reaches)")  # fmt: skip
    listing.add_argument("--days", type=_days, default=7, metavar="N", help="list jobs of the last N days (default: 7)")
    status = command("status", _status, "shows the state of jobs, where their logs are, and the last line of each log")
    for made in (listing, status):
        made.add_argument("--json", action="store_true", help="print JSON instead of text")
    logs = command("logs", _logs, "prints the log of a job")
    logs.add_argument("id", metavar="ID", help="an id, as `list` shows it")
    logs.add_argument("--follow", action="store_true", help="go on until the job has ended, across restarts")
    logs.add_argument("--node", type=_node, default=0, metavar="N", help="node of a job on several nodes (default: 0)")
    cancel = command("cancel", _cancel, "asks jobs to stop for good; they commit a checkpoint before they end")
    wait = command("wait", _wait, "waits for jobs, and ends with the exit code of the first that fails")
    for made in (status, cancel, wait):
        made.add_argument("ids", nargs="+", metavar="ID", help="an id, as `list` shows it")


def _days(text: str) -> int:
    return _at_least(text, 1)


def _node(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected {least} or more, found {text}")
    return int(text)


def _job(argv: Sequence[str] | None) -> int:
    if not (sys.argv[1:] if argv is None else argv):
        message = "control expects a command: list, status, logs, cancel or wait"
        raise UsageError(
            message, "for example `python jobs/control.py list`; `python jobs/control.py --help` says more"
        )
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # the subcommand's parser suggests its flags
    refuse_empty(given)
    if given.settings and given.command == "list" and not given.cluster:
        raise UsageError("--settings is for one cluster, and list asks all", "add --cluster slurm or --cluster k8s")
    code: int = given.job(given)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; returns its exit code. `--help` raises SystemExit, as argparse does."""
    with unfailing():
        try:
            return guarded(lambda: _job(argv))
        except KeyboardInterrupt:
            print("interrupted; the jobs go on", file=sys.stderr)
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
