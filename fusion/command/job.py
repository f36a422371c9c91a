"""Runs a command: parses its settings, does its job, and turns an error into two lines and an exit code."""

from __future__ import annotations

import atexit
import gc
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from fusion import signals, storage
from fusion.command.exit import report
from fusion.command.settings import parse
from fusion.config import StoreConfig
from fusion.environment import prepare_libraries, prepare_threads
from fusion.errors import ExitCode, FusionError
from fusion.terminal.error_display import print_report
from fusion.terminal.streams import unfailing

C = TypeVar("C", bound=StoreConfig)


def run(config_class: type[C], job: Callable[[C], None], argv: Sequence[str] | None, *, module: str, doc: str) -> int:
    """Runs `job` with the settings from flags, environment and config file, and returns the exit code.

    Args:
        argv: the flags; None for those of this process.
        module: name of the command, as in `python -m module`.
        doc: what `--help` says at its beginning.
    """

    def parsed_job() -> ExitCode:
        config = parse(config_class, argv, prog=f"python -m {module}", description=doc)
        storage.set_patience(config.store_timeout)
        with signals.listening():
            job(config)
        return ExitCode.DONE

    prepare_libraries()
    prepare_threads()
    atexit.register(gc.freeze)  # spares the end of the process a second, in which it would search torch for garbage
    with unfailing():
        try:
            return guarded(parsed_job)
        except KeyboardInterrupt:  # a second Ctrl-C, or one before `signals.listening`
            print_report(FusionError("interrupted", "run the same command again").report())
            return 128 + signal.SIGINT


def guarded(job: Callable[[], int]) -> int:
    """Runs `job` and returns its exit code; what it prints cannot fail.

    A `FusionError` is printed as an error and a hint, and gives its own exit code. Any other exception is a bug: it is
    printed with its traceback, and the exit code is 70.
    """
    with unfailing():
        return _guarded(job)


def _guarded(job: Callable[[], int]) -> int:
    try:
        return job()
    except FusionError as error:
        report(error)
        return error.code
    except Exception as error:
        message = f"this is a bug in fusion: {type(error).__name__}: {error}"
        report(FusionError(message, "report it with the log of the run"), traceback.format_exc())
        return ExitCode.BUG
