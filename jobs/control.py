"""Lists the jobs that were sent to Slurm, to Kubernetes or to this machine, and shows, follows, awaits or cancels them.

    python jobs/control.py list                     # what was sent in the last week, to every cluster that is here
    python jobs/control.py status 1234              # Slurm; of an array 1234_0 as well
    python jobs/control.py logs --follow job/fusion-train-qwen-clip      # Kubernetes; also jobset/NAME
    python jobs/control.py cancel here/4711         # this machine; the number is that of the process
    python jobs/control.py wait 1234                # ends with the job's exit code

All of it is asked from the clusters; nothing is kept here, so that it works from any machine that reaches them.
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

try:
    from fusion import storage
    from fusion.command import guarded, terminal
    from fusion.command.exit import report
    from fusion.errors import ExitCode, FusionError, Parser, UsageError, visible
    from fusion.streams import unfailing
    from jobs.arguments import refuse_empty
    from jobs.schedulers import kubernetes_settings
    from jobs.schedulers.kubectl import Kubectl
    from jobs.schedulers.kubernetes_sent import KubernetesJobs
    from jobs.schedulers.local_sent import KIND, LocalJobs
    from jobs.schedulers.sent import WAITING, Jobs, Sent
    from jobs.schedulers.slurm_sent import SlurmJobs
except ImportError as wrong_python:
    if __name__ != "__main__":
        raise
    print(f"error: {wrong_python} for {sys.executable}", file=sys.stderr)
    print("hint: run `. .venv/bin/activate` first; `make demo` makes .venv", file=sys.stderr)
    sys.exit(78)  # ExitCode.CONFIG, which cannot be imported here

ROOT = Path(__file__).parents[1]
PROGRAMS = {"slurm": "squeue", "k8s": "kubectl", "local": "sh"}  # where one is, its cluster may be
SLURM_ID = re.compile(r"\d+(_\d+)?")
MINUTE = len("2026-01-02T03:04")


def _list(given: argparse.Namespace) -> ExitCode:
    found, failed = [], []
    for cluster in [given.cluster] if given.cluster else filter(_is_here, PROGRAMS):
        try:
            found += _jobs(cluster, given).all(given.days)
        except FusionError as error:
            if given.cluster:
                raise
            failed.append(error)
    found.sort(key=lambda job: job.sent, reverse=True)
    _print_json(found) if given.json else _print_table(found, given.days)
    for one in failed:
        report(one)
    return failed[0].code if failed and not found else ExitCode.DONE


def _status(given: argparse.Namespace) -> ExitCode:
    found = [job for job_id in given.ids for job in _of(job_id, given).find(job_id)]
    if given.json:
        _print_json(found)
    for job in [] if given.json else found:
        print(_shown(job), flush=True)
    return ExitCode.DONE


def _logs(given: argparse.Namespace) -> ExitCode:
    jobs = _of(given.id, given)
    found = jobs.find(given.id)
    if len(found) > 1:
        ids = ", ".join(job.id for job in found)
        raise UsageError(f"{given.id} is an array of {len(found)} jobs: {ids}", f"name one of them: {found[0].id}")
    if given.follow and found[0].state == WAITING:
        print(visible(f"{found[0].id} waits ({found[0].why}); its log follows"), file=sys.stderr, flush=True)
    for line in jobs.log(found[0], node=given.node, follow=given.follow):
        print("\t".join(map(visible, line.rstrip("\r").split("\t"))), flush=True)
    return ExitCode.DONE


def _cancel(given: argparse.Namespace) -> ExitCode:
    for job_id in given.ids:
        jobs = _of(job_id, given)
        for job in jobs.find(job_id):
            if job.is_over:
                print(f"{job.id} is {job.state} already")
                continue
            jobs.cancel(job)
            print(
                f"{job.id} is asked to stop; what it has committed stays, and the same job sent again goes on from it"
            )
    return ExitCode.DONE


def _wait(given: argparse.Namespace) -> int:
    codes = []
    for job_id in given.ids:
        jobs = _of(job_id, given)
        codes.append(jobs.wait(jobs.find(job_id)))
    return next((code for code in codes if code), ExitCode.DONE)


def _of(job_id: str, given: argparse.Namespace) -> Jobs:
    """The jobs of the cluster that ids of this form belong to."""
    if SLURM_ID.fullmatch(job_id):
        return _jobs("slurm", given)
    return _jobs("local" if job_id.startswith(f"{KIND}/") else "k8s", given)


def _is_here(cluster: str) -> bool:
    """Whether there is a cluster to ask, as far as this machine can tell."""
    if not shutil.which(PROGRAMS[cluster]):
        return False
    return cluster != "k8s" or bool(Kubectl.now(None).context or "KUBERNETES_SERVICE_HOST" in os.environ)


def _jobs(cluster: str, given: argparse.Namespace) -> Jobs:
    if cluster == "local":
        return LocalJobs()
    if cluster == "slurm":
        return SlurmJobs(given.settings or ROOT / "slurm" / "cluster.toml")
    settings = kubernetes_settings.read(given.settings or ROOT / "k8s" / "cluster.toml")
    return KubernetesJobs(Kubectl.now(given.namespace or settings.namespace, given.context or settings.context))


def _print_table(found: Sequence[Sent], days: int) -> None:
    if not found:
        print(f"no jobs of the last {days} days")
        return
    table = terminal.table(f"Jobs of the last {days} days", "id", "state", "code", "sent (UTC)", "name", "")
    for job in found:
        code = "-" if job.code is None else str(job.code)
        # On Kubernetes the id is the name, and a table is read in one glance only where it fits.
        name = "" if job.id.endswith(f"/{job.name}") else job.name
        terminal.add(table, job.id, job.state, code, job.sent[:MINUTE].replace("T", " "), name, job.why)
    terminal.show(table)


def _shown(job: Sent) -> str:
    """What there is to say of a job, a line for each; text of the cluster does not drive the terminal."""
    state = job.state + (f" with exit code {job.code}" if job.code is not None else "")
    facts = {"": f"{job.name}: {state}" + (f" ({job.why})" if job.why else ""), "sent": job.sent}
    facts |= {"started": job.started, "ended": job.ended, "log": job.log}
    told = [visible(f"{job.id:<8} {facts.pop('')}")]
    told += [visible(f"  {name:<8} {value}") for name, value in facts.items() if value]
    return "\n".join([*told, *(f"  {visible(line)}" for line in job.said.splitlines())])


def _print_json(found: Iterable[Sent]) -> None:
    sys.stdout.write(storage.as_json([asdict(job) for job in found]).decode())


def _parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("python jobs/control.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def command(name: str, job: Callable[[argparse.Namespace], int], text: str) -> Parser:
        made: Parser = commands.add_parser(name, help=text, description=f"{text}.", allow_abbrev=False)
        made.set_defaults(job=job, parser=made)
        made.add_argument("--settings", type=Path, metavar="FILE",
            help="of the cluster (default: slurm/cluster.toml, k8s/cluster.toml)")  # fmt: skip
        made.add_argument("--context", metavar="NAME", help="of the kubeconfig (default: as in k8s/cluster.toml, or "
            "the current one)")  # fmt: skip
        made.add_argument("--namespace", metavar="NAME", help="of Kubernetes (default: as in k8s/cluster.toml, or that "
            "of the context)")  # fmt: skip
        return made

    _add_commands(command)
    return parser


def _add_commands(command: Callable[..., Parser]) -> None:
    listing = command("list", _list, "lists the jobs that were sent, the newest first")
    listing.add_argument("--cluster", choices=list(PROGRAMS), help="only those of one (default: all that are here)")
    listing.add_argument("--days", type=_days, default=7, metavar="N", help="how far back (default: 7)")
    status = command("status", _status, "shows how jobs are, where their logs are, and what they said last")
    for made in (listing, status):
        made.add_argument("--json", action="store_true", help="JSON instead of text")
    logs = command("logs", _logs, "prints the log of a job")
    logs.add_argument("id", metavar="ID", help="as `list` shows it")
    logs.add_argument("--follow", action="store_true", help="until the job has ended, through its restarts")
    logs.add_argument("--node", type=_node, default=0, metavar="N", help="of a job on several nodes (default: 0)")
    cancel = command("cancel", _cancel, "asks jobs to stop for good; they commit what they have done")
    wait = command("wait", _wait, "waits for jobs, and ends with the exit code of the first that fails")
    for made in (status, cancel, wait):
        made.add_argument("ids", nargs="+", metavar="ID", help="as `list` shows it")


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
        message = "control.py expects a command: list, status, logs, cancel or wait"
        raise UsageError(message, "for example `python jobs/control.py list`; --help says more")
    given, unknown = _parser().parse_known_args(argv)
    if unknown:
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # which knows the flags that are near
    refuse_empty(given)
    if given.settings and given.command == "list" and not given.cluster:
        raise UsageError("--settings is of one cluster, and list asks all", "name it as well: --cluster slurm or k8s")
    code: int = given.job(given)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; gives its exit code. `--help` raises SystemExit, as argparse does."""
    with unfailing():
        try:
            return guarded(lambda: _job(argv))
        except KeyboardInterrupt:
            print("interrupted; the jobs go on", file=sys.stderr)
            return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
