"""What can go wrong for a user, each with its exit code, and how a command ends with it.

A user error carries two lines: what is wrong, and what to do about it. All else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn

# What torch says in a rank that waits for one which is gone.
LOST_PEER = re.compile("connection (closed|reset)|broken pipe|remote process|ncclRemoteError", re.IGNORECASE)


class ExitCode(IntEnum):
    """Exit codes of every command, after sysexits.h where it has one."""

    DONE = 0
    USAGE = 64
    DATA = 65
    UNREACHABLE = 69
    BUG = 70
    STOPPED = 75
    CREDENTIALS = 77
    CONFIG = 78
    STALLED = 124


def visible(text: str) -> str:
    """The text with control characters written out: what a file or a bucket says must not drive the terminal.

    >>> print(visible("a\x1b[2J"))
    a\\x1b[2J
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class FusionError(Exception):
    """An error with an exit code, one line for what is wrong and one for what to do.

    >>> print(DataError("train.csv has no column 'price'", "add the column").report())
    error: train.csv has no column 'price'
    hint: add the column
    """

    code = ExitCode.BUG

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)  # both, so that the error survives pickling between ranks
        self.message, self.remedy = (visible(" ".join(text.splitlines())) for text in (message, remedy))

    def __str__(self) -> str:
        return self.message

    def report(self) -> str:
        return f"error: {self.message}\nhint: {self.remedy}"


class UsageError(FusionError):
    """A flag or argument that no command knows."""

    code = ExitCode.USAGE


# What other tools call flags of ours: too far from them to be found by their letters.
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


class Parser(argparse.ArgumentParser):
    """Flags of a command; what it does not understand is a `UsageError`, with the nearest flag that exists.

    Attributes:
        example: what follows the command's name in a typical call, shown where something required is missing.
    """

    example = ""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        wrong = next((word.split("=")[0].rstrip(":") for word in message.split() if word.startswith("--")), "")
        near = [SYNONYMS[wrong]] if SYNONYMS.get(wrong) in known else difflib.get_close_matches(wrong, known, n=1)
        near = [] if wrong in known else near
        remedy = f"did you mean {near[0]}? " if near else ""
        if self.example and "required" in message:
            remedy = f"for example `{self.prog} {self.example}`; "
        raise UsageError(message, f"{remedy}`{self.prog} --help` lists all flags")


def filled(flag: str) -> Callable[[str], str]:
    """Type of a flag or argument that must not be empty: an empty URL would mean the root folder."""

    def check(text: str) -> str:
        if not text:
            raise ConfigError(f"{flag} is empty", f"give {flag} a value, or leave it out")
        return text

    return check


def seconds(text: str) -> float:
    """Type of a flag that is a time."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}, expected 0 or more")
    return float(text)


class DataError(FusionError):
    """Input that cannot be used as it is: a file, a column, a value, a missing object."""

    code = ExitCode.DATA


class UnreachableError(FusionError):
    """The store did not answer, also after retries."""

    code = ExitCode.UNREACHABLE


class CredentialsError(FusionError):
    """The store answered, and refused: no, wrong or expired credentials, or no permission."""

    code = ExitCode.CREDENTIALS


class ConfigError(FusionError):
    """A known setting with a value that is not allowed, or that contradicts another."""

    code = ExitCode.CONFIG


class StopRequested(FusionError):
    """Stopped on request, with everything that was done committed."""

    code = ExitCode.STOPPED


class StalledError(FusionError):
    """A rank made no progress for too long."""

    code = ExitCode.STALLED


class SupersededError(FusionError):
    """A newer attempt at the same run has begun: this one may publish nothing more."""

    code = ExitCode.CONFIG


class DivergedError(FusionError):
    """A loss or metric that is not finite: nothing that follows could be trusted."""

    code = ExitCode.BUG
