"""The errors that a user can cause or fix, each with its exit code, and the argument parser that raises them.

A `FusionError` is printed as two lines: what is wrong, and what to do about it. Any other exception is a bug, and is
printed with its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, NoReturn

from fusion.terminal.escapes import visible
from fusion.terminal.help_screen import HelpFormatter, Rare, first_screen
from fusion.terminal.spelling import as_typed

# Matches the messages that torch raises in a rank that communicates with a rank whose process has died.
LOST_PEER = re.compile("connection (closed|reset)|broken pipe|remote process|ncclRemoteError", re.IGNORECASE)


class ExitCode(IntEnum):
    """Exit codes of every command. Codes from 64 to 78 have the meaning of sysexits.h; `timeout` ends with 124, too."""

    DONE = 0
    USAGE = 64
    DATA = 65
    UNREACHABLE = 69
    BUG = 70
    STOPPED = 75
    CREDENTIALS = 77
    CONFIG = 78
    STALLED = 124


class FusionError(Exception):
    """An error with an exit code, one line that says what is wrong, and one that says what to do.

    >>> print(DataError("train.csv has no column 'price'", "add the column").report())
    error: train.csv has no column 'price'
    hint: add the column
    """

    code = ExitCode.BUG

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)  # with both arguments, pickle can rebuild the error on another rank
        self.message, self.remedy = (visible(" ".join(text.splitlines())) for text in (message, remedy))

    def __str__(self) -> str:
        """Message and hint, so that a traceback in a notebook shows both."""
        return f"{self.message}\nhint: {self.remedy}"

    def report(self) -> str:
        """Both lines, with commands as the user types them."""
        return as_typed(f"error: {self.message}\nhint: {self.remedy}")


class UsageError(FusionError):
    """A flag or argument that the command does not know."""

    code = ExitCode.USAGE


# Names that other tools give to some of our flags, and that are spelt too differently for `difflib` to match them.
SYNONYMS = {
    "--learning-rate": "--lr",
    "--learning_rate": "--lr",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--num-epochs": "--epochs",
    "--max-epochs": "--epochs",
    "--output-dir": "--output",
    "--data-dir": "--data",
    "--gpu": "--device",
}


# What a user of other tools types for a flag, as argparse reports it: `lr=3e-4`.
_ASSIGNED = re.compile(r"^unrecognized arguments: ([a-zA-Z][\w.-]*)=(\S+)")


def _flag_for(name: str, known: Sequence[str]) -> str:
    """The known flag that `name` without dashes stands for; empty if there is none."""
    flag = f"--{name.replace('_', '-')}"
    return next((one for one in (flag, SYNONYMS.get(flag, "")) if one in known), "")


def did_you_mean(wrong: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The start of a hint, "did you mean NAME? ", with the most similar known name; empty if none is similar.

    >>> did_you_mean("bath-size", ["batch-size", "lr"]), did_you_mean("x", ["lr"])
    ('did you mean batch-size? ', '')

    Args:
        cutoff: the least similarity by difflib, from 0 to 1.
    """
    return "".join(f"did you mean {name}? " for name in difflib.get_close_matches(wrong, list(known), 1, cutoff))


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`, with the most similar flag, instead of exiting.

    Attributes:
        example: the arguments of a typical call, shown when a required argument is missing.
    """

    example = ""

    def __init__(self, prog: str, **options: Any) -> None:
        texts = ("usage", "description", "epilog")
        shown = {name: as_typed(options[name]) for name in texts if options.get(name)}
        usual = {"formatter_class": HelpFormatter, "allow_abbrev": False, "add_help": False}
        super().__init__(as_typed(prog), **{**usual, **options, **shown})
        self._shows_all = False
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.add_argument("--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def format_help(self) -> str:
        """What `--help` prints; after `show_all`, what `--help-all` prints."""
        return super().format_help() if self._shows_all else first_screen(self, super().format_help)

    def show_all(self) -> None:
        self._shows_all = True

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        # argparse only gives its message; the first word in it that looks like a flag is the wrong one.
        wrong = next((word.split("=")[0].rstrip(":") for word in message.split() if word.startswith("--")), "")
        assigned = _ASSIGNED.search(message)
        if assigned and (flag := _flag_for(assigned[1], known)):
            remedy = f"did you mean {flag} {assigned[2]}? "
        elif wrong in known:  # the flag is right, so its value is wrong
            remedy = ""
        elif SYNONYMS.get(wrong) in known:
            remedy = f"did you mean {SYNONYMS[wrong]}? "
        else:
            remedy = did_you_mean(wrong, known)
        if self.example and "required" in message:
            remedy = f"for example `{self.prog} {self.example}`; "
        flag = "--help-all" if any(isinstance(action.help, Rare) for action in self._actions) else "--help"
        raise UsageError(message, f"{remedy}`{self.prog} {flag}` lists all flags")


class _HelpAll(argparse.Action):
    """`--help-all`: prints the help with all flags, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        parser.show_all()
        parser.print_help()
        parser.exit()


def filled(flag: str) -> Callable[[str], str]:
    """An argparse type for a flag that must not be empty, because an empty URL would mean the root folder."""

    def check(text: str) -> str:
        if not text:
            raise ConfigError(f"{flag} is empty", f"give {flag} a value, or leave it out")
        return text

    return check


def seconds(text: str) -> float:
    """An argparse type for a flag that is a number of seconds."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}, expected 0 or more")
    return float(text)


class DataError(FusionError):
    """Input that cannot be used: a missing or damaged object, a missing column, a wrong value."""

    code = ExitCode.DATA


class UnreachableError(FusionError):
    """The store did not answer, even after retries."""

    code = ExitCode.UNREACHABLE


class CredentialsError(FusionError):
    """The store refused: credentials are missing, wrong or expired, or lack a permission."""

    code = ExitCode.CREDENTIALS


class ConfigError(FusionError):
    """A setting has a value that is not allowed, or that contradicts another setting."""

    code = ExitCode.CONFIG


class StopRequested(FusionError):
    """The command stopped on request, after it committed what it had done; running it again continues."""

    code = ExitCode.STOPPED


class StalledError(FusionError):
    """A rank made no progress for longer than the stall timeout."""

    code = ExitCode.STALLED


class SupersededError(FusionError):
    """A newer attempt at the same run has started, so this one must not publish anything more."""

    code = ExitCode.CONFIG


class DivergedError(FusionError):
    """A loss or metric is not finite, so no later result could be trusted."""

    code = ExitCode.BUG
