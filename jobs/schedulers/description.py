"""What is to be run: one description of a job, the same for every cluster.

A job is one of Fusion's commands with all of its settings as flags. They are checked and frozen at submission, so that
a mistake costs a second and not an hour in a queue, and nothing that is edited later changes a job that waits.
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
LEAST = {"nodes": 1, "gpus_per_node": 0, "nproc_per_node": 1, "cpus_per_gpu": 1, "memory_per_gpu": 1}
LATER = (*PER_GPU, "queue", "priority", "jobset")  # jobs that leave them out are called what they were before


@dataclass(frozen=True)
class Job:
    """One command of Fusion and what it needs.

    Attributes:
        flags: settings of the command, see `frozen`.
        gpus_per_node: None leaves it to the cluster: one for training, none for the rest.
        nproc_per_node: ranks per node; None leaves it to the launcher: one per GPU, or a single one.
        cpus_per_gpu, memory_per_gpu: cores, and GiB of memory, for each of its GPUs; None: as the cluster has it.
        queue: LocalQueue of Kueue, or partition of Slurm.
        priority: PriorityClass of Kubernetes, or QOS of Slurm.
        jobset: whether Kubernetes gets a JobSet in place of a Job.
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
        _expect_one_of("--variant", self.variant, _predicting() if self.task == "predict" else variants())
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {value}, expected at least {least}", f"give {flag} {least} or more")
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
        """The command of every node, the same on every cluster."""
        n_ranks = self.nproc_per_node or (None if self.gpus_per_node is None else max(1, self.gpus_per_node))
        ranks = ["--nproc-per-node", str(n_ranks)] if n_ranks else []
        return [python, "-m", "fusion.launch", *ranks, self.module, *self.flags]

    def digest(self, *further: str) -> str:
        """Eight letters that differ between jobs with different settings."""
        given = {name: value for name, value in asdict(self).items() if value or name not in LATER}
        return digest([given, *further])[:8]

    def check_amounts(self, n_gpus: int) -> None:
        """Raises UsageError where something is asked for per GPU, and the job asks for no GPU."""
        for name in PER_GPU:
            if getattr(self, name) and not n_gpus:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {getattr(self, name)}, and the job asks for no GPU", f"leave out {flag}")


def config_class(variant: str, task: str) -> type[Any]:
    """The settings that a task of a variant takes.

    Raises:
        UsageError: there is no such variant.
    """
    if task == "predict":
        _expect_one_of("--variant", variant, _predicting())
        return PredictConfig
    _expect_one_of("--variant", variant, variants())
    trains: type[RunConfig] = import_module(f"fusion.{variant}.config").Config
    return {"train": trains, "evaluate": EvaluateConfig}[task]


def _predicting() -> list[str]:
    """What test.csv can be predicted with."""
    return [*variants(), ENSEMBLE_VARIANT]


def frozen(job: Job) -> Job:
    """The job with the settings of its flags, of FUSION_… variables and of a `--config` file as flags alone.

    Raises:
        UsageError: a flag that the command does not know.
        ConfigError: a value that it does not allow.
    """
    flags = as_flags(config_class(job.variant, job.task), job.flags, prog=f"python -m {job.module}")
    return replace(job, flags=tuple(flags))


def each_fold(job: Job) -> list[Job]:
    """One job per fold, for a frozen job with `--folds`."""
    if job.task != "train" or "--folds" not in job.flags:
        raise UsageError("--each-fold needs a training with --folds", "give both: --each-fold -- --folds 5")
    flags = list(job.flags)
    if "--fold" in flags:
        at = flags.index("--fold")
        del flags[at : at + 2]
    n_folds = int(flags[flags.index("--folds") + 1])
    return [replace(job, flags=(*flags, "--fold", str(fold))) for fold in range(n_folds)]


def check_together(jobs: Sequence[Job]) -> None:
    """Raises UsageError when several jobs would write to one run, or to one submission."""
    if len(jobs) > 1 and jobs[0].task == "predict":
        raise UsageError(
            f"{len(jobs)} predictions would publish under one name", "give one --variant, and one --name each"
        )
    if len(jobs) > 1 and jobs[0].task == "train" and any("--run-id" in job.flags for job in jobs):
        raise UsageError(f"--run-id names one run, and these are {len(jobs)}", "leave out --run-id")


def _expect_one_of(flag: str, value: str, allowed: Sequence[str] | dict[str, str]) -> None:
    if value not in allowed:
        raise UsageError(f"{flag} is {value!r}, expected one of {', '.join(allowed)}", f"give {flag} one of these")
