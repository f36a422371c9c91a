"""Runs a subcommand of `fusion`, as `python -m` runs its module: with the same flags, messages and exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from fusion.cli.commands import COMMANDS, Command, overview
from fusion.terminal.spelling import as_typed, program, subcommands
from fusion.terminal.streams import unfailing

HELP = ("-h", "--help", "--help-all", "help")
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand that `argv` names, and returns its exit code. `--help` raises SystemExit, as argparse does.

    Args:
        argv: the subcommand and its flags; None for those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_module = Path(sys.argv[0]).name == "__main__.py"
    with unfailing(), subcommands("python -m fusion" if is_module else "fusion"):
        if not words or (words[0] in HELP and len(words) == 1):
            print(overview())
            return 0
        code = _run(words)
    if argv is None:
        _before_exit(words[0], code)
    return code


def _run(words: list[str]) -> int:
    from fusion.command import guarded  # not imported for the overview, which shall appear at once
    from fusion.errors import FusionError
    from fusion.terminal.error_display import print_report

    if words[0] in HELP:
        words = [*words[1:], "--help"]
    try:
        return guarded(lambda: _dispatch(words))
    except KeyboardInterrupt:
        print_report(FusionError("interrupted", "run the same command again").report())
        return INTERRUPTED


def _dispatch(words: list[str]) -> int:
    command, rest = _command(words[0]), words[1:]
    module = command.module
    if command.of_variant:
        from fusion.cli.variant import choose, known_to

        if rest and rest[0] in HELP:
            print(_variants_of(command, known_to(command)))
            return 0
        variant, rest = choose(command, rest)
        module = module.format(variant=variant)
    code: int = import_module(module).main(rest)
    return code


def _command(name: str) -> Command:
    from fusion.errors import UsageError, did_you_mean

    name = {"--version": "version", "-V": "version"}.get(name, name)
    if name in COMMANDS:
        return COMMANDS[name]
    near = did_you_mean(name, COMMANDS)
    raise UsageError(f"there is no command {name!r}", f"{near}`{program()} --help` lists the commands")


def _variants_of(command: Command, known: Sequence[str]) -> str:
    lines = [as_typed(f"  python -m {command.module.format(variant=one)} --help") for one in known]
    return "\n".join([f"{command.name} is for one variant of the model. Its flags are listed by", "", *lines])


def _before_exit(name: str, code: int) -> None:
    """What the modules do at their end when they are run by `python -m`."""
    if name == "launch":  # a stop signal that arrives while the interpreter shuts down would replace the exit code
        from fusion import signals

        for number in signals.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # sys.exit would wait for threads that may be waiting for a store that does not answer
