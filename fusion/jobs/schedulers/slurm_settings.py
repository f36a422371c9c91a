"""The settings of a Slurm cluster, read from `slurm/cluster.toml` or from the file that `--settings` names."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from fusion.config import STRICT
from fusion.errors import ConfigError
from fusion.jobs.schedulers.description import MODULES, PER_GPU, Job
from fusion.jobs.schedulers.settings_file import read_settings, refuse_secrets


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Cluster:
    """What jobs request from Slurm, and what runs on their nodes before them.

    The comments in `slurm/cluster.toml` explain each setting.
    """

    folder: str
    python: str = "python"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_minutes: int = Field(240, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    gres: str | None = None
    cpus_per_node: int = Field(4, ge=1)
    mem_gb: int | None = Field(None, ge=1)
    cpus_per_gpu: int | None = Field(None, ge=1)
    memory_per_gpu: int | None = Field(None, ge=1)
    # At least 90 s: the launcher gives its ranks 60 s to commit a checkpoint, then the launchers of all nodes wait for
    # each other, and the requeue may need 30 s. With less, Slurm would kill jobs before they are requeued.
    signal_seconds: int = Field(120, ge=90)
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    srun: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    credentials: str | None = None
    export: tuple[str, ...] = ()
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_secrets(self.environment, "the script of the job")
        # A job is asked to stop signal_seconds before its end. At least as much time must be left for work.
        if self.time_minutes * 60 < 2 * self.signal_seconds:
            stop = f"the job is asked to stop signal_seconds = {self.signal_seconds} before its end"
            raise ValueError(f"time_minutes = {self.time_minutes} leaves no time to work: {stop}")

    def asked(self, job: Job) -> Cluster:
        """The settings with those that the job gives itself in their place.

        Raises:
            UsageError: the job asks for cores or memory per GPU, and for no GPU.
        """
        n_gpus = self.n_gpus(job.task, job.gpus_per_node)
        job.check_per_gpu(n_gpus)
        per_gpu = {name: getattr(job, name) or getattr(self, name) or 0 for name in PER_GPU}
        changed: dict[str, Any] = {"partition": job.queue, "qos": job.priority}
        changed |= {"cpus_per_node": per_gpu["cpus_per_gpu"] * n_gpus, "mem_gb": per_gpu["memory_per_gpu"] * n_gpus}
        return replace(self, **{name: value for name, value in changed.items() if value})

    def parameters(self, task: str, gpus_per_node: int | None) -> dict[str, Any]:
        """The parameters that submitit renders as `#SBATCH` lines."""
        names = ("partition", "account", "qos", "constraint")
        asked = {name: getattr(self, name) for name in names}
        asked |= {"time": self.time_minutes, "cpus_per_task": self.cpus_per_node, "signal_delay_s": self.signal_seconds}
        asked |= {"mem": f"{self.mem_gb}G"} if self.mem_gb else {}
        extra = {"requeue": True, "export": ",".join(self.export) or "NONE", **self.sbatch}
        return asked | self._gpus(self.n_gpus(task, gpus_per_node)) | {"additional_parameters": extra}

    def n_gpus(self, task: str, asked: int | None) -> int:
        """GPUs per node: as the job asks, else as in these settings, else one for training and none for other tasks."""
        if asked is not None:
            return asked
        return self.gpus_per_node if self.gpus_per_node is not None else int(task == "train")

    def _gpus(self, n_gpus: int) -> dict[str, Any]:
        if not n_gpus:
            return {}
        return {"gres": self.gres.replace("{n}", str(n_gpus))} if self.gres else {"gpus_per_node": n_gpus}

    def exports(self) -> dict[str, str]:
        """The variables to export in jobs. Empty ones are unset, and FUSION_… have been turned into flags."""
        return {name: value for name, value in self.environment.items() if value and not name.startswith("FUSION_")}

    def setup_lines(self) -> list[str]:
        """Lines of shell that a job runs before its command: those of `setup`, and one that reads the credentials."""
        if not self.credentials:
            return list(self.setup)
        return [*self.setup, f"set -a && . {shlex.quote(str(self._credentials()))} && set +a"]

    def container(self) -> list[str]:
        """Arguments of srun for pyxis, the plugin that runs containers; empty without an image."""
        mounts = [f"--container-mounts={','.join(self.container_mounts)}"] if self.container_mounts else []
        return [f"--container-image={self.container_image}", *mounts] if self.container_image else []

    def check_credentials(self) -> None:
        """Raises ConfigError when the file with credentials is missing here, or when others can read it."""
        if not self.credentials:
            return
        path = self._credentials()
        if not path.is_file():
            raise ConfigError(f"credentials is {path}, and there is no such file", "write it, or remove the setting")
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} is open to other users", f"chmod 600 {path}")

    def _credentials(self) -> Path:
        # Absolute, because `.` in the shell would search a name without a slash in PATH.
        return Path(str(self.credentials)).expanduser().absolute()


def read(path: Path, task: str) -> Cluster:
    """Reads the settings for a task: those at the top of the file, overridden by those of its table, such as `[train]`.

    Raises:
        ConfigError: the file does not exist, is not TOML, or has an unknown key or an invalid value.
    """

    def merge(values: dict[str, Any]) -> dict[str, Any]:
        tables = {name: values.pop(name, {}) for name in MODULES}
        own: dict[str, Any] = tables.get(task, {})
        return values | own

    return read_settings(Cluster, path, "slurm/cluster.toml", merge)
