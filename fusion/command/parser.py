"""What the argument parsers of commands without a config class have in common."""

from __future__ import annotations

from typing import Any

from fusion.environment import variable
from fusion.errors import Parser, filled, seconds
from fusion.terminal.help_screen import Rare


def command_parser(prog: str, doc: str | None, example: str, **options: Any) -> Parser:
    """A parser that shows `doc` in its help, and `example` when a required argument is missing.

    Args:
        options: further arguments of `argparse.ArgumentParser`.
    """
    parser = Parser(prog=prog, description=doc, **options)
    parser.example = example
    return parser


def add_output(parser: Parser, what: str) -> None:
    """Adds `--output`; `what` is the help text, without the default."""
    parser.add_argument(
        "--output",
        metavar="URL",
        type=filled("--output"),
        default=variable("FUSION_OUTPUT") or "output",
        help=f"{what} (default: FUSION_OUTPUT, else output)",
    )


def add_store_timeout(parser: Parser) -> None:
    parser.add_argument(
        "--store-timeout",
        metavar="S",
        type=seconds,
        default=variable("FUSION_STORE_TIMEOUT") or "60",
        help=Rare("seconds to retry a store that does not answer (default: 60)"),
    )
