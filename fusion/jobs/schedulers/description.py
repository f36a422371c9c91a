"""Describes a job in the same way for every cluster.

A job is one of Fusion's commands with all of its settings as flags. The settings are validated and written into flags
before the job is submitted. A mistake is thus found at once and not after an hour in a queue, and editing a settings
file later does not change jobs that are already in the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

from fusion.command.settings import as_flags
from fusion.config import EvaluateConfig, PredictConfig, RunConfig, digest
from fusion.errors import UsageError
from fusion.records.schemas import ENSEMBLE_VARIANT
from fusion.variants import variants

MODULES = {"train": "train", "evaluate": "evaluate_by_groups", "predict": "predict_test"}

PER_GPU = ("cpus_per_gpu", "memory_per_gpu")
MINIMUM = {"nodes": 1, "gpus_per_node": 0, "nproc_per_node": 1, "cpus_per_gpu": 1, "memory_per_gpu": 1}
# Fields that were added after the first release. They enter the digest, and so the name, of a job only if they are set:
# the names of jobs without them stay the same.
ADDED_LATER = (*PER_GPU, "queue", "priority", "jobset")


@dataclass(frozen=True)
class Job:
    """One command of Fusion and the resources that it needs.

    Attributes:
        task: train, evaluate or predict.
        flags: settings of the command as flags, see `frozen`.
        gpus_per_node: None: one GPU for training and none for the other tasks, unless the cluster's settings say more.
        nproc_per_node: ranks per node; None: the launcher starts one per GPU, or a single one without GPUs.
        cpus_per_gpu: CPU cores per GPU; None: as in the cluster's settings.
        memory_per_gpu: GiB of memory per GPU; None: as in the cluster's settings.
        queue: LocalQueue of Kueue, or partition of Slurm.
        priority: PriorityClass of Kubernetes, or QOS of Slurm.
        jobset: whether a JobSet is sent to Kubernetes in place of a Job.
    """

    variant: str
    task: str
    flags: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int | None = None
    nproc_per_node: int | None = None
    cpus_per_gpu: int | None = None
    memory_per_gpu: int | None = None
    queue: str | None = None
    priority: str | None = None
    jobset: bool = False

    def __post_init__(self) -> None:
        _expect_one_of("--task", self.task, MODULES)
        _expect_one_of("--variant", self.variant, _variants_for_prediction() if self.task == "predict" else variants())
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {value}, expected at least {minimum}", f"give {flag} {minimum} or more")
        if self.nodes > 1 and self.task != "train":
            raise UsageError(f"--nodes is {self.nodes}, and {self.task} runs on one node", "leave out --nodes")
        if self.jobset and self.nodes == 1:
            raise UsageError("--jobset is for several nodes, and --nodes is 1", "give both: --jobset --nodes 2")

    @property
    def name(self) -> str:
        return f"fusion-{self.task}-{self.variant.replace('_', '-')}"

    @property
    def module(self) -> str:
        return f"fusion.{self.variant}.{MODULES[self.task]}"

    def command(self, python: str = "python") -> list[str]:
        """The command that every node runs. It is the same on every cluster."""
        n_ranks = self.nproc_per_node
        if n_ranks is None and self.gpus_per_node is not None:
            n_ranks = max(1, self.gpus_per_node)
        ranks = ["--nproc-per-node", str(n_ranks)] if n_ranks else []
        return [python, "-m", "fusion.launch", *ranks, self.module, *self.flags]

    def digest(self, *further: str) -> str:
        """Eight hex digits that differ between jobs with different settings.

        Args:
            further: other texts that the digest depends on, such as the image.
        """
        given = {name: value for name, value in asdict(self).items() if value or name not in ADDED_LATER}
        return digest([given, *further])[:8]

    def check_per_gpu(self, n_gpus: int) -> None:
        """Raises UsageError when the job asks for cores or memory per GPU, and `n_gpus` per node is 0."""
        for name in PER_GPU:
            if getattr(self, name) and not n_gpus:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {getattr(self, name)}, and the job asks for no GPU", f"leave out {flag}")


def config_class(variant: str, task: str) -> type[Any]:
    """The class of the settings that a task of a variant takes.

    Raises:
        UsageError: there is no such variant.
    """
    if task == "predict":
        _expect_one_of("--variant", variant, _variants_for_prediction())
        return PredictConfig
    _expect_one_of("--variant", variant, variants())
    trains: type[RunConfig] = import_module(f"fusion.{variant}.config").Config
    return {"train": trains, "evaluate": EvaluateConfig}[task]


def _variants_for_prediction() -> list[str]:
    """The values of --variant that can predict test.csv."""
    return [*variants(), ENSEMBLE_VARIANT]


def frozen(job: Job) -> Job:
    """The job with all its settings as flags: those given as flags, in FUSION_… variables and in a `--config` file.

    Raises:
        UsageError: the command does not know a flag.
        ConfigError: a setting has an invalid value.
    """
    flags = as_flags(config_class(job.variant, job.task), job.flags, prog=f"python -m {job.module}")
    return replace(job, flags=tuple(flags))


def each_fold(job: Job) -> list[Job]:
    """One job per fold, for a job that `frozen` returned and that has the flag `--folds`."""
    if job.task != "train" or "--folds" not in job.flags:
        raise UsageError("--each-fold needs a training with --folds", "give both: --each-fold -- --folds 5")
    flags = list(job.flags)
    if "--fold" in flags:
        at = flags.index("--fold")
        del flags[at : at + 2]
    n_folds = int(flags[flags.index("--folds") + 1])
    return [replace(job, flags=(*flags, "--fold", str(fold))) for fold in range(n_folds)]


def check_together(jobs: Sequence[Job]) -> None:
    """Raises UsageError when several jobs would write to the same run, or to the same submission."""
    if len(jobs) > 1 and jobs[0].task == "predict":
        raise UsageError(
            f"{len(jobs)} predictions would publish under one name",
            "submit each alone, with one --variant and a --name of its own",
        )
    if len(jobs) > 1 and jobs[0].task == "train" and any("--run-id" in job.flags for job in jobs):
        raise UsageError(f"--run-id names one run, and these are {len(jobs)}", "leave out --run-id")


def _expect_one_of(flag: str, value: str, allowed: Sequence[str] | dict[str, str]) -> None:
    if value not in allowed:
        raise UsageError(f"{flag} is {value!r}, expected one of {', '.join(allowed)}", f"give {flag} one of these")
