"""What a check of `doctor.py` came to, and what it may ask about the job."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fusion.command.settings import parse
from fusion.config import RunConfig
from fusion.errors import ExitCode
from jobs.schedulers.description import config_class


@dataclass(frozen=True)
class Job:
    """The job that is about to run.

    Attributes:
        variant: whose sources the data must have; None: any.
        flags: settings as they were typed: --output, --data, --sources.ROLE.
    """

    output: str
    data: str
    variant: str | None = None
    flags: tuple[str, ...] = ()

    @property
    def settings(self) -> RunConfig:
        """Settings of the job's variant, or those that all variants share.

        Raises:
            ConfigError: a variable, or the file that FUSION_CONFIG names, holds what is not allowed.
        """
        return read_settings(self.variant, self.flags)


def read_settings(variant: str | None, flags: Sequence[str]) -> RunConfig:
    """What these flags and the environment set, of a variant or of what all share; read once, as it may warn."""
    environment = sorted(item for item in os.environ.items() if item[0].startswith("FUSION_"))
    return _read_settings(variant, tuple(flags), tuple(environment))


@cache
def _read_settings(variant: str | None, flags: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> RunConfig:
    wanted: type[RunConfig] = config_class(variant, "train") if variant else RunConfig
    return parse(wanted, flags, prog="python jobs/doctor.py", description="")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        remedy: what to do; empty when all is well.
        code: the exit code that a job would end with, of a failure.
    """

    verdict: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""
    code: ExitCode = ExitCode.DONE


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        about: what it looks at, for `--help`.
        look: None when there is nothing to look at here.
        needs: name of an earlier check; if that failed, this one could not say anything.
    """

    name: str
    about: str
    look: Callable[[Job], Finding | None]
    needs: str = ""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warn(found: str, remedy: str) -> Finding:
    return Finding("warn", found, remedy)


def fail(found: str, remedy: str, code: ExitCode) -> Finding:
    return Finding("fail", found, remedy, code)


def size(n_bytes: float) -> str:
    """Bytes for people.

    >>> [size(n) for n in (0, 67108864, 25769803776, 1e20)]
    ['0 MiB', '64 MiB', '24.0 GiB', '93132257461.5 GiB']
    """
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
