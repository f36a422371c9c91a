"""The settings of a Kubernetes cluster, read from `k8s/cluster.toml` or from the file that `--settings` names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass

from fusion.config import STRICT
from fusion.jobs.schedulers.description import PER_GPU, Job
from fusion.jobs.schedulers.settings_file import read_settings, refuse_secrets

# The name of an image: host, port, path, and a tag or a digest. Spaces and line breaks are excluded, because the name
# is inserted into YAML files.
IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._/-]*(:[0-9]+/[A-Za-z0-9._/-]+)?(:[A-Za-z0-9_.-]+)?(@sha256:[0-9a-f]{64})?$"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Cluster:
    """Defaults for the jobs of this cluster. The comments in `k8s/cluster.toml` explain each setting."""

    image: str = Field(pattern=IMAGE)
    context: str | None = None
    namespace: str | None = None
    queue: str | None = None
    priority: str | None = None
    cpus_per_gpu: int | None = Field(None, ge=1)
    memory_per_gpu: int | None = Field(None, ge=1)
    environment: dict[str, str] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_secrets(self.environment, "a ConfigMap")

    def completed(self, job: Job) -> Job:
        """The job with these settings wherever it has none of its own. Jobs without GPUs get no settings per GPU."""
        has_gpus = job.task == "train" if job.gpus_per_node is None else job.gpus_per_node > 0
        names = ["queue", "priority", *(PER_GPU if has_gpus else ())]
        return replace(job, **{name: getattr(job, name) or getattr(self, name) for name in names})


def read(path: Path) -> Cluster:
    """Reads the settings of a file.

    Raises:
        ConfigError: the file does not exist, is not TOML, or has an unknown key or an invalid value.
    """
    return read_settings(Cluster, path, "k8s/cluster.toml")
