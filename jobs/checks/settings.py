"""The settings that a job would have, from the environment that `doctor.py` itself is in."""

from __future__ import annotations

from fusion.config import RunConfig
from fusion.flags import parse
from jobs.checks.findings import Job
from jobs.clusters.description import config_class


def read_settings(job: Job) -> RunConfig:
    """Settings of the job's variant, or those that all variants share.

    Raises:
        ConfigError: a variable, or the file that FUSION_CONFIG names, holds what is not allowed.
    """
    wanted: type[RunConfig] = config_class(job.variant, "train") if job.variant else RunConfig
    return parse(wanted, ["--output", job.output, "--data", job.data], prog="doctor.py", description="")
