"""Writes the page with every flag of every command: `python -m docs.tools.commands`.

The flags come from the parsers that the commands use. A test compares the page with what this writes.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from docs.tools.parsers import parser_of
from fusion.cli.commands import GROUPS, Command
from fusion.terminal.spelling import as_typed, subcommands
from fusion.variants import variants

PAGE = Path(__file__).parents[1] / "reference" / "commands.md"
HEAD = """\
# Commands

<!-- made by `python -m docs.tools.commands`; do not edit -->

`fusion COMMAND --help` shows the most important flags in a terminal, and `--help-all` all of them. Each command is also
a module, which is named below; `python -m MODULE` takes the same flags.
"""
DEFAULT = re.compile(r"[;,]? ?\(default: (.*)\)$", re.DOTALL)
MAIN = "all_embeddings"  # its flags are listed in full; of other variants, those that differ

Row = tuple[str, str, str, str]  # flag, default, variable, meaning


def page() -> str:
    # Without a width, argparse would wrap usages at that of the terminal.
    with subcommands("fusion"), patch.dict(os.environ, COLUMNS="100"):
        parts = [part for heading, group in GROUPS.items() for part in _group(heading, group)]
    return "\n".join([HEAD, *parts])


def _group(heading: str, group: tuple[Command, ...]) -> Iterator[str]:
    yield f"## {heading[0].upper()}{heading[1:]}\n"
    for command in group:
        if not command.of_variant and find_spec(command.module.removesuffix(".__main__")) is None:
            continue
        yield f"### fusion {command.name}\n\n{command.about[0].upper()}{command.about[1:]}.\n"
        yield from _of_variants(command) if command.of_variant else _sections(command.module)


def _of_variants(command: Command) -> Iterator[str]:
    module = command.module.format(variant=MAIN)
    yield from _sections(module)
    known = _rows(parser_of(module))
    for variant in variants():
        other = command.module.format(variant=variant)
        different = [row for row in _rows(parser_of(other)) if row not in known]
        if different:
            yield f"`fusion {command.name} {variant}` (`{other}`) has other defaults:\n"
            yield _table(different)


def _sections(module: str) -> Iterator[str]:
    """The tables of a command, or of each of its subcommands."""
    parser = parser_of(module)
    yield f"Module: `{module.removesuffix('.__main__')}`\n"
    yield f"```text\n{as_typed(_usage(parser))}\n```\n"
    yield from _tables(parser)
    for name, inner in _subparsers(parser).items():
        yield f"**`{name}`**: {_own_help(parser, name)}\n"
        yield from _tables(inner)


def _tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table per group of flags; arguments that are in no group of their own come first."""
    usual = parser._action_groups[:2]  # "positional arguments" and "options" of argparse
    if rows := [row for group in usual for row in _rows(parser, group._group_actions)]:
        yield _table(rows)
    for group in parser._action_groups[2:]:
        yield f"*{group.title}*\n"
        yield _table(_rows(parser, group._group_actions))


def _usage(parser: argparse.ArgumentParser) -> str:
    """Without the list of flags, which is long, and follows."""
    usage = parser.format_usage().removeprefix("usage: ").replace("[-h] ", "").replace(" [-h]", "").strip()
    lines = usage.splitlines()
    if len(lines) == 1:
        return usage
    words = [action.metavar or action.dest for action in parser._actions if not action.option_strings]
    return " ".join([parser.prog, "[flags]", *(str(word) for word in words)])


def _rows(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action] | None = None) -> list[Row]:
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    listed = parser._actions if actions is None else actions
    actions = [one for one in listed if not isinstance(one, hidden) and one.help != argparse.SUPPRESS]
    return [_row(action, parser) for action in actions]


def _row(action: argparse.Action, parser: argparse.ArgumentParser) -> Row:
    text = as_typed((action.help or "").replace("%(prog)s", parser.prog).replace("%%", "%"))
    given = DEFAULT.search(text)
    default = given[1] if given else "required" if action.required and action.option_strings else ""
    name = ", ".join(f"`{option}{_value(action)}`" for option in action.option_strings)
    is_setting = parser.argument_default == argparse.SUPPRESS and action.option_strings
    variable = f"`FUSION_{action.dest.replace('.', '_').upper()}`" if is_setting else ""
    return name or f"`{_value(action).strip()}`", default, variable, DEFAULT.sub("", text)


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices and action.metavar is None:
        return " " + "|".join(map(str, action.choices))
    names = action.metavar or action.dest.upper()
    return " " + (" ".join(names) if isinstance(names, tuple) else names) + (" …" if action.nargs in ("+", "*") else "")


def _table(rows: list[Row]) -> str:
    columns = [0, 1, 2, 3] if any(row[2] for row in rows) else [0, 1, 3]
    heads = ("flag", "default", "environment", "meaning")
    lines = [[heads[column] for column in columns], ["---"] * len(columns)]
    lines += [[_cell(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """A text in a table of Markdown; there, a bar ends a cell even within code."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _own_help(parser: argparse.ArgumentParser, name: str) -> str:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return next((as_typed(one.help or "") for one in found[0]._choices_actions if one.dest == name), "")


if __name__ == "__main__":
    PAGE.write_text(page())
