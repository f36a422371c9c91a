"""The types of `doctor.py`: a check, the job that it checks for, and the result that it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fusion.command.settings import parse
from fusion.config import RunConfig
from fusion.errors import ExitCode
from fusion.jobs.schedulers.description import config_class


@dataclass(frozen=True)
class PlannedJob:
    """The job that the checks are made for.

    Attributes:
        output, data: URLs or folders.
        variant: the model variant whose sources the data must have; None accepts any sources.
        flags: the flags as typed on the command line: --output, --data, --sources.ROLE.
    """

    output: str
    data: str
    variant: str | None = None
    flags: tuple[str, ...] = ()

    @property
    def settings(self) -> RunConfig:
        """The training settings of the job's variant; without a variant, those that all variants share.

        Raises:
            ConfigError: a FUSION_… variable, or the file that FUSION_CONFIG names, holds an invalid value.
        """
        return read_settings(self.variant, self.flags)


def read_settings(variant: str | None, flags: Sequence[str]) -> RunConfig:
    """The training settings that result from these flags and the environment.

    Equal arguments and an equal environment are parsed once: parsing may log a warning, which several checks would
    repeat otherwise.

    Args:
        variant: None reads the settings that all variants share.
    """
    environment = sorted(item for item in os.environ.items() if item[0].startswith("FUSION_"))
    return _read_settings(variant, tuple(flags), tuple(environment))


@cache
def _read_settings(variant: str | None, flags: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> RunConfig:
    wanted: type[RunConfig] = config_class(variant, "train") if variant else RunConfig
    return parse(wanted, flags, prog="python jobs/doctor.py", description="")


@dataclass(frozen=True)
class CheckResult:
    """The result of one check: one line of the report.

    Attributes:
        found: what the check found, in words.
        remedy: what the user can do about it; empty when the verdict is ok.
        code: for a failure, the exit code that a job would end with.
    """

    verdict: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""
    code: ExitCode = ExitCode.DONE


@dataclass(frozen=True)
class Check:
    """One check of `doctor.py`.

    Attributes:
        about: what it checks, for `--help`.
        run: makes the check; returns None when it does not apply here.
        needs: name of an earlier check; when that failed or was skipped, this one is skipped.
    """

    name: str
    about: str
    run: Callable[[PlannedJob], CheckResult | None]
    needs: str = ""


def ok(found: str) -> CheckResult:
    return CheckResult("ok", found)


def warn(found: str, remedy: str) -> CheckResult:
    return CheckResult("warn", found, remedy)


def fail(found: str, remedy: str, code: ExitCode) -> CheckResult:
    return CheckResult("fail", found, remedy, code)


def size(n_bytes: float) -> str:
    """A number of bytes as text, in MiB or GiB.

    >>> [size(n) for n in (0, 67108864, 25769803776, 1e20)]
    ['0 MiB', '64 MiB', '24.0 GiB', '93132257461.5 GiB']
    """
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
