"""Settings of a Slurm cluster: `slurm/cluster.toml`, or the file that `--settings` names."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from fusion.config import STRICT
from fusion.errors import ConfigError
from jobs.schedulers.description import MODULES, PER_GPU, Job
from jobs.schedulers.settings_file import read_settings, refuse_secrets


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Cluster:
    """What a job asks Slurm for, and what its nodes need before they run it; `slurm/cluster.toml` explains each."""

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
    signal_seconds: int = Field(120, ge=90)  # the launcher gives ranks 60 s, and launchers wait for one another
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
        if self.time_minutes * 60 < 2 * self.signal_seconds:
            stop = f"the job is asked to stop signal_seconds = {self.signal_seconds} before its end"
            raise ValueError(f"time_minutes = {self.time_minutes} leaves no time to work: {stop}")

    def asked(self, job: Job) -> Cluster:
        """These settings, with what the job asks for in their place.

        Raises:
            UsageError: something is asked for per GPU, and there is none.
        """
        n_gpus = self.n_gpus(job.task, job.gpus_per_node)
        job.check_amounts(n_gpus)
        per_gpu = {name: getattr(job, name) or getattr(self, name) or 0 for name in PER_GPU}
        changed: dict[str, Any] = {"partition": job.queue, "qos": job.priority}
        changed |= {"cpus_per_node": per_gpu["cpus_per_gpu"] * n_gpus, "mem_gb": per_gpu["memory_per_gpu"] * n_gpus}
        return replace(self, **{name: value for name, value in changed.items() if value})

    def parameters(self, task: str, gpus_per_node: int | None) -> dict[str, Any]:
        """What submitit renders as `#SBATCH`."""
        names = ("partition", "account", "qos", "constraint")
        asked = {name: getattr(self, name) for name in names}
        asked |= {"time": self.time_minutes, "cpus_per_task": self.cpus_per_node, "signal_delay_s": self.signal_seconds}
        asked |= {"mem": f"{self.mem_gb}G"} if self.mem_gb else {}
        extra = {"requeue": True, "export": ",".join(self.export) or "NONE", **self.sbatch}
        return asked | self._gpus(self.n_gpus(task, gpus_per_node)) | {"additional_parameters": extra}

    def n_gpus(self, task: str, asked: int | None) -> int:
        """GPUs per node: as many as the job asks for, else as these settings have it."""
        default = self.gpus_per_node if self.gpus_per_node is not None else int(task == "train")
        return default if asked is None else asked

    def _gpus(self, n_gpus: int) -> dict[str, Any]:
        if not n_gpus:
            return {}
        return {"gres": self.gres.replace("{n}", str(n_gpus))} if self.gres else {"gpus_per_node": n_gpus}

    def exports(self) -> dict[str, str]:
        """Variables that jobs get; FUSION_… are flags by now, and an empty one is unset."""
        return {name: value for name, value in self.environment.items() if value and not name.startswith("FUSION_")}

    def lines(self) -> list[str]:
        """Lines of shell that the job runs before its command."""
        if not self.credentials:
            return list(self.setup)
        return [*self.setup, f"set -a && . {shlex.quote(str(self._credentials()))} && set +a"]

    def container(self) -> list[str]:
        """Arguments of srun for pyxis."""
        mounts = [f"--container-mounts={','.join(self.container_mounts)}"] if self.container_mounts else []
        return [f"--container-image={self.container_image}", *mounts] if self.container_image else []

    def check_credentials(self) -> None:
        """Raises ConfigError when the file with credentials is missing here, or open to others."""
        if not self.credentials:
            return
        path = self._credentials()
        if not path.is_file():
            raise ConfigError(f"credentials is {path}, and there is no such file", "write it, or leave the setting out")
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} is open to others than you", f"chmod 600 {path}")

    def _credentials(self) -> Path:
        return Path(str(self.credentials)).expanduser().absolute()  # the shell looks up a bare name in PATH


def read(path: Path, task: str) -> Cluster:
    """The settings for a task: those at the top of the file, and over them those under `[train]` and the like.

    Raises:
        ConfigError: no such file, no TOML, an unknown key or a value that is not allowed.
    """

    def merged(values: dict[str, Any]) -> dict[str, Any]:
        tables = {name: values.pop(name, {}) for name in MODULES}
        own: dict[str, Any] = tables.get(task, {})
        return values | own

    return read_settings(Cluster, path, "slurm/cluster.toml", merged)
