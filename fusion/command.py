"""How every command runs: parse settings, do the job, and turn an error into two lines and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from fusion import storage
from fusion.config import StoreConfig, parse
from fusion.errors import ExitCode, FusionError

C = TypeVar("C", bound=StoreConfig)


def run(config_class: type[C], job: Callable[[C], None], argv: Sequence[str] | None, *, module: str, doc: str) -> int:
    """Exit code of `job` with the settings in `argv`, the environment and the config file.

    A `FusionError` prints what is wrong and what to do. Anything else is a bug: its traceback, and 70.
    """
    try:
        config = parse(config_class, argv, prog=f"python -m {module}", description=doc)
        storage.set_patience(config.store_timeout)
        job(config)
        return ExitCode.DONE
    except FusionError as error:
        _say(error.report())
        return error.code
    except Exception:
        traceback.print_exc()
        _say("error: this is a bug in fusion, see the traceback above\nto do: report it with the log of the run")
        return ExitCode.BUG


def _say(report: str) -> None:
    # Ranks of one run fail together and for the same reason: one of them speaks.
    if os.environ.get("RANK", "0") == "0":
        print(report, file=sys.stderr, flush=True)
