"""Starts a training, an evaluation or a prediction on Slurm, on Kubernetes or on this machine.

    python jobs/submit.py --cluster slurm --variant all_embeddings --task train --gpus-per-node 4 \\
        -- --precision bf16 --data s3://bucket/data --output s3://bucket/output
    python jobs/submit.py --cluster local -- --device cpu --epochs 5 --data data --output output

Flags after `--` are those of the command that the job runs. `--dry-run` prints what would be sent, and needs no
cluster. The exit code is 0 when the job has been submitted; with `--wait`, and with `--cluster local`, it is the job's.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fusion import storage
from fusion.command import guarded
from fusion.command.settings import parse
from fusion.errors import ExitCode, Parser, UsageError
from fusion.jobs.arguments import checkout
from fusion.jobs.schedulers import local
from fusion.jobs.schedulers.description import MODULES, Job, check_together, config_class, each_fold, frozen
from fusion.records.provenance import ENSEMBLE_CODE
from fusion.records.schemas import ENSEMBLE_VARIANT
from fusion.terminal.help_screen import Rare
from fusion.terminal.streams import unfailing
from fusion.variants import variants

ROOT = checkout()
SETTINGS = {"slurm": ROOT / "slurm" / "cluster.toml", "k8s": ROOT / "k8s" / "cluster.toml"}
# The clusters on which each flag has an effect. With another cluster it is an error, so that no flag is silently
# ignored.
ONLY_FOR = {
    "settings": ("slurm", "k8s"), "queue": ("slurm", "k8s"), "priority": ("slurm", "k8s"),
    "cpus_per_gpu": ("slurm", "k8s"), "memory_per_gpu": ("slurm", "k8s"), "max_requeues": ("slurm",),
    "image": ("k8s",), "namespace": ("k8s",), "context": ("k8s",), "jobset": ("k8s",),
}  # fmt: skip
DEFAULTS = {"max_requeues": 100, "jobset": False}
NEEDS = ("nodes", "gpus_per_node", "nproc_per_node", "cpus_per_gpu", "memory_per_gpu", "queue", "priority", "jobset")


@dataclass(frozen=True)
class Target:
    """The jobs of this command for one cluster.

    Attributes:
        render: returns what would be sent, for --dry-run.
        run: sends and, if asked for, awaits them; returns the exit code of this command.
    """

    render: Callable[[], str]
    run: Callable[[], int]


def main(argv: Sequence[str] | None = None) -> int:
    with unfailing():
        try:
            return guarded(lambda: _submit(list(sys.argv[1:] if argv is None else argv)))
        except KeyboardInterrupt:
            print("interrupted; jobs that were submitted go on", file=sys.stderr)
            return 128 + signal.SIGINT


def _submit(argv: list[str]) -> int:
    given, flags = _parse(argv)
    _check_cluster(given)
    make_target = {"slurm": _slurm, "k8s": _kubernetes, "local": _local}[given.cluster]
    target = make_target(given, flags)
    if given.if_changed and given.task != "predict":
        raise UsageError(f"--if-changed is for predictions, and --task is {given.task}", "leave out --if-changed")
    if given.if_changed and given.cluster == "k8s":
        message = "--if-changed reads the bucket from here, and does not know the one in the cluster's ConfigMap"
        hint = "leave out --if-changed: the prediction itself finds out in seconds whether something changed"
        raise UsageError(message, hint)
    if given.dry_run:
        sys.stdout.write(target.render())
        return ExitCode.DONE
    if given.if_changed and _nothing_changed(given, flags):
        return ExitCode.DONE
    return target.run()


def _local(given: argparse.Namespace, flags: Sequence[str]) -> Target:
    jobs = _jobs(given, flags)
    local.check(jobs)
    return Target(lambda: local.render(jobs), lambda: local.run(jobs))


def _slurm(given: argparse.Namespace, flags: Sequence[str]) -> Target:
    from fusion.jobs.schedulers import slurm, slurm_settings, slurm_wait

    cluster = slurm_settings.read(given.settings or SETTINGS["slurm"], given.task)
    for name, value in cluster.environment.items():
        if value and not os.environ.get(name):  # an empty variable counts as unset
            os.environ[name] = value  # so that FUSION_… variables of the cluster's settings become flags of the job
    jobs = _jobs(given, flags)
    cluster = cluster.asked(jobs[0])

    def run() -> int:
        cluster.check_credentials()
        if given.wait:
            slurm_wait.check_accounting()
        ids = slurm.submit(jobs, cluster, given.max_requeues)
        return slurm_wait.wait(ids, cluster) if given.wait else ExitCode.DONE

    return Target(lambda: slurm.render(jobs, cluster, given.max_requeues), run)


def _kubernetes(given: argparse.Namespace, flags: Sequence[str]) -> Target:
    from fusion.jobs.schedulers import kubernetes, kubernetes_settings, kubernetes_wait
    from fusion.jobs.schedulers.kubectl import Kubectl

    cluster = kubernetes_settings.read(given.settings or SETTINGS["k8s"])
    jobs = [cluster.completed(job) for job in _jobs(given, flags)]
    is_in_files = cluster.image == kubernetes.image_of(ROOT / "k8s")
    image = given.image or (None if is_in_files else cluster.image)

    def run() -> int:
        kubectl = Kubectl.now(given.namespace or cluster.namespace, given.context or cluster.context)
        names = kubernetes.submit(jobs, image, kubectl, ROOT / "k8s")
        return kubernetes_wait.wait(names, kubectl) if given.wait else ExitCode.DONE

    return Target(lambda: kubernetes.render(jobs, image, ROOT / "k8s"), run)


def _check_cluster(given: argparse.Namespace) -> None:
    """Raises UsageError for a flag that has no effect on the chosen cluster."""
    for name, clusters in ONLY_FOR.items():
        flag = f"--{name.replace('_', '-')}"
        if getattr(given, name) != DEFAULTS.get(name) and given.cluster not in clusters:
            message = f"{flag} is for --cluster {' or '.join(clusters)}, and --cluster is {given.cluster}"
            raise UsageError(message, f"leave out {flag}")


def _jobs(given: argparse.Namespace, flags: Sequence[str]) -> list[Job]:
    """One job per variant, or per variant and fold, with validated settings."""
    needs = {name: getattr(given, name) for name in NEEDS}
    jobs = [frozen(Job(variant, given.task, tuple(flags), **needs)) for variant in given.variant]
    if given.each_fold:
        jobs = [fold for job in jobs for fold in each_fold(job)]
    check_together(jobs)
    return jobs


def _nothing_changed(given: argparse.Namespace, flags: Sequence[str]) -> bool:
    """Whether each variant's last submission is still valid; if so, it has been published under the new date."""
    urls = [_published(variant, flags) for variant in given.variant]
    for url in filter(None, urls):
        print(f"nothing has changed: {url}", flush=True)
    return all(urls)


def _published(variant: str, flags: Sequence[str]) -> str | None:
    """Publishes the last submission under the day's date if data, model and code have not changed since.

    Returns:
        The URL of the day's submission; None when something has changed.
    """
    from fusion.submissions.unchanged import published, republish

    settings = parse(
        config_class(variant, "predict"), flags, prog=f"python -m fusion.{variant}.predict_test", description=""
    )
    storage.set_patience(settings.store_timeout)
    if variant == ENSEMBLE_VARIANT:
        return republish(replace(settings, date=settings.day()), variant, ENSEMBLE_CODE)
    return published(settings, config_class(variant, "train"))


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    given, unknown = _parser().parse_known_args(argv[:at])
    if unknown:
        remedy = f"put flags of the command after `--`: -- {' '.join(unknown)}; `--help` lists those of jobs/submit.py"
        raise UsageError(f"{unknown[0]} is not a flag of jobs/submit.py", remedy)
    return given, argv[at + 1 :]


def _parser() -> Parser:
    parser = Parser("python jobs/submit.py", description=__doc__)
    parser.example = "--cluster local -- --data s3://my-bucket/data --output s3://my-bucket/output"
    parser.usage = f"{parser.prog} --cluster slurm|k8s|local [flags] [-- flags of the command]"
    _add_what(parser.add_argument_group("what").add_argument)
    _add_how(parser.add_argument_group("how").add_argument)
    return parser


Add = Callable[..., argparse.Action]  # adds a flag to a group


def _add_what(add: Add) -> None:
    add("--task", default="train", metavar="|".join(MODULES), help="what to run (default: train)")
    add("--variant", nargs="+", default=["all_embeddings"], metavar="NAME",
        help=f"{', '.join(variants())}; --task predict also takes {ENSEMBLE_VARIANT}; with several names, one job per "
        "name (default: all_embeddings)")  # fmt: skip
    add("--each-fold", action="store_true", help=Rare("start one training per fold of the command's --folds"))
    add("--nodes", type=int, default=1, metavar="N", help="nodes to train on (default: 1)")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs per node, with one rank per GPU; 0 uses the "
        "CPU (default: as in k8s/ or in the settings of the Slurm cluster; with local, all GPUs)")  # fmt: skip
    add("--nproc-per-node", type=int, metavar="N", help=Rare("ranks per node (default: one per GPU, or a single one)"))
    add("--cpus-per-gpu", type=int, metavar="N", help=Rare("CPU cores per GPU (default: the cluster's)"))
    add(
        "--memory-per-gpu",
        type=_gibibytes,
        metavar="GIB",
        help=Rare("GiB of memory per GPU (default: the cluster's)"),
    )


def _add_how(add: Add) -> None:
    add("--cluster", required=True, choices=["slurm", "k8s", "local"], help="where to run the job")
    add("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    add("--wait", action="store_true", help="wait until the job has ended; the exit code is the job's")
    add("--if-changed", action="store_true", help=Rare("predict only if data, model or code have changed; "
        "otherwise this command publishes the last rows under the new date"))  # fmt: skip
    add("--settings", type=Path, metavar="FILE", help=Rare("settings of the cluster (default: "
        "slurm/cluster.toml, k8s/cluster.toml)"))  # fmt: skip
    add("--queue", metavar="NAME", help="Slurm's partition, or the LocalQueue of Kueue on Kubernetes")
    add("--priority", metavar="NAME", help=Rare("Slurm's QOS, or the PriorityClass of Kubernetes"))
    add("--max-requeues", type=_count, default=DEFAULTS["max_requeues"], metavar="N",
        help=Rare("how often a Slurm job is requeued after it was stopped or preempted (default: 100)"))  # fmt: skip
    add("--image", metavar="NAME", help=Rare("image for Kubernetes (default: as in k8s/cluster.toml)"))
    add(
        "--context",
        metavar="NAME",
        help=Rare("context of the kubeconfig (default: that of the settings, else current)"),
    )
    add(
        "--namespace",
        metavar="NAME",
        help=Rare("namespace of Kubernetes (default: that of the settings, else the context's)"),
    )
    add("--jobset", action="store_true", help=Rare("on Kubernetes, send a training on several nodes as a JobSet"))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or more, found {text}")
    return int(text)


def _gibibytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)(G|Gi|GB|GiB)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected a whole number of GiB, found {text}")
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
