"""The text of `--help`: one screen with what a person needs first; `--help-all` shows the rest."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

# A terminal window usually has 24 to 50 lines. More than 40 would have to be scrolled back on most of them.
MAX_LINES = 40
# Column at which the texts of flags begin, so that `--sources.siglip-image NAME` shares a line with its text.
TEXT_COLUMN = 31
_CONTINUED = " \\\n" + " " * 8  # a shell command goes on in the next line


class Rare(str):
    """The help text of a flag that only `--help-all` lists."""

    __slots__ = ()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills paragraphs to the width of the terminal; keeps indented lines, which are commands, as they are."""

    def __init__(self, prog: str, width: int | None = None) -> None:
        super().__init__(prog, max_help_position=TEXT_COLUMN, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = (_filled(paragraph, width) for paragraph in text.strip("\n").split("\n\n"))
        return textwrap.indent("\n\n".join(filled), indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


def _filled(paragraph: str, width: int) -> str:
    lines = paragraph.splitlines()
    if any(line.startswith("  ") for line in lines):
        return "\n".join(_command(line, width) for line in lines)
    return textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)


def _command(line: str, width: int) -> str:
    """A line of a shell, continued in the next lines if it is too long."""
    lines = [""]
    for part in re.split(r" (?=--\w)", line):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > width:  # 3: a space before the part, and " \" after it
            lines.append(part)
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return _CONTINUED.join(lines)


def first_screen(parser: argparse.ArgumentParser, format_help: Callable[[], str]) -> str:
    """The help without rare flags, and with as many paragraphs of the description as fit on one screen.

    The first two paragraphs, which are the purpose and the examples, are always shown.
    """
    rare = [action for action in parser._actions if isinstance(action.help, Rare)]
    paragraphs = (parser.description or "").strip("\n").split("\n\n")
    with _unchanged(parser, rare):
        for action in rare:
            action.help = argparse.SUPPRESS
        for n_shown in range(len(paragraphs), min(2, len(paragraphs)) - 1, -1):
            parser.description = "\n\n".join(paragraphs[:n_shown])
            text = format_help() + _more(len(rare), n_shown < len(paragraphs))
            if len(text.splitlines()) <= MAX_LINES:
                break
    return text


def _more(n_rare: int, is_cut: bool) -> str:
    """The last line, which says what `--help-all` adds; empty if it adds nothing."""
    flags = "1 more flag" if n_rare == 1 else f"{n_rare} more flags"
    parts = [*(["more about this command"] if is_cut else []), *([flags] if n_rare else [])]
    return f"\n{' and '.join(parts)}: --help-all\n" if parts else ""


@contextmanager
def _unchanged(parser: argparse.ArgumentParser, actions: Iterable[argparse.Action]) -> Iterator[None]:
    """Restores the description and the texts of flags at the end."""
    before = parser.description, [(action, action.help) for action in actions]
    try:
        yield
    finally:
        parser.description = before[0]
        for action, text in before[1]:
            action.help = text
