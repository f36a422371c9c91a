"""Prints the versions that a report of an error should contain: `fusion version`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

import fusion
from fusion.command import guarded
from fusion.command.parser import command_parser
from fusion.errors import ExitCode
from fusion.records.provenance import revision
from fusion.terminal.spelling import program


def versions() -> str:
    """One line per version; torch is not loaded for it."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    found = {"revision": revision(), "python": platform.python_version(), "torch": torch}
    return "\n".join([f"fusion {fusion.__version__}", *(f"{name:<9} {version}" for name, version in found.items())])


def _job(argv: Sequence[str] | None) -> ExitCode:
    command_parser(f"{program()} version", __doc__, "").parse_args(argv)
    print(versions())
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. `--help` raises SystemExit, as in argparse."""
    return guarded(lambda: _job(argv))
