"""How every command runs: parse settings, do the job, and turn an error into two lines and an exit code."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from fusion import signals, storage
from fusion.command.exit import tell
from fusion.command.settings import parse
from fusion.config import StoreConfig
from fusion.environment import prepare_libraries
from fusion.errors import ExitCode, FusionError
from fusion.streams import unfailing

C = TypeVar("C", bound=StoreConfig)


def run(config_class: type[C], job: Callable[[C], None], argv: Sequence[str] | None, *, module: str, doc: str) -> int:
    """Exit code of `job` with the settings in `argv`, the environment and the config file."""

    def parsed_job() -> ExitCode:
        config = parse(config_class, argv, prog=f"python -m {module}", description=doc)
        storage.set_patience(config.store_timeout)
        with signals.listening():
            job(config)
        return ExitCode.DONE

    prepare_libraries()
    with unfailing():
        try:
            return guarded(parsed_job)
        except KeyboardInterrupt:  # a second Ctrl-C, or one before the job listens
            print(FusionError("interrupted", "run the same command again").report(), file=sys.stderr)
            return 128 + signal.SIGINT


def guarded(job: Callable[[], int]) -> int:
    """Exit code of `job`; what it prints cannot fail.

    A `FusionError` prints what is wrong and what to do. Anything else is a bug: its traceback, and 70.
    """
    with unfailing():
        return _guarded(job)


def _guarded(job: Callable[[], int]) -> int:
    try:
        return job()
    except FusionError as error:
        tell(error)
        return error.code
    except Exception as error:
        message = f"this is a bug in fusion: {type(error).__name__}: {error}"
        tell(FusionError(message, "report it with the log of the run"), traceback.format_exc())
        return ExitCode.BUG
