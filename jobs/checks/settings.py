"""The settings that a job would have, from the environment that `doctor.py` itself is in."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from fusion.config import RunConfig, parse
from fusion.errors import ConfigError
from jobs.checks.findings import Job


def read_settings(job: Job) -> RunConfig:
    """Settings of the job's variant, or those that all variants share.

    Raises:
        ConfigError: a variable, or the file that FUSION_CONFIG names, holds what is not allowed; no such variant.
    """
    return parse(
        _config_class(job.variant), ["--output", job.output, "--data", job.data], prog="doctor.py", description=""
    )


def _config_class(variant: str | None) -> type[RunConfig]:
    if variant is None:
        return RunConfig
    if not variant.isidentifier() or not find_spec(f"fusion.{variant}"):
        raise ConfigError(f"there is no variant {variant!r}", "name one such as all_embeddings or qwen_clip")
    found: type[RunConfig] = import_module(f"fusion.{variant}.config").Config
    return found
