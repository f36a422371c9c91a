"""The argument parsers of all commands, as the commands themselves build them, without running any command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any
from unittest.mock import patch

from fusion.command import job
from fusion.command.settings import parse

PARSE = "parse_known_args"  # which `parse_args` calls, too
_parse_known_args = argparse.ArgumentParser.parse_known_args
# `doctor` leaves these flags to the parser of the variant.
LEFT = "--sources."


class Parsed(BaseException):
    """Ends a command right after it has parsed its arguments."""

    def __init__(self, parser: argparse.ArgumentParser | None = None) -> None:
        super().__init__()
        self.parser = parser


def accepts(module: str, arguments: Sequence[str]) -> bool:
    """Whether the command parses these arguments; what it says about them is printed on standard error."""
    with patch.object(job, "parse", _settings_parsed), patch.object(argparse.ArgumentParser, PARSE, _parsed):
        try:
            return bool(import_module(module).main(list(arguments)) == 0)
        except Parsed:
            return True
        except SystemExit as end:  # --help
            return not end.code


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that the command builds."""
    with patch.object(argparse.ArgumentParser, PARSE, _not_parsed):
        try:
            import_module(module).main(["--help"])
        except Parsed as stopped:
            if stopped.parser is not None:
                return stopped.parser
    raise AssertionError(f"{module} does not parse arguments")


def _settings_parsed(*arguments: Any, **named: Any) -> None:
    with patch.object(argparse.ArgumentParser, PARSE, _parse_known_args):
        parse(*arguments, **named)
    raise Parsed


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None, *_: Any) -> None:
    with patch.object(argparse.ArgumentParser, PARSE, _parse_known_args):  # subcommands have parsers of their own
        _, unknown = parser.parse_known_args(arguments)
    if unknown and not unknown[0].startswith(LEFT):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise Parsed(parser)


def _not_parsed(parser: argparse.ArgumentParser, *_: Any) -> None:
    raise Parsed(parser)
