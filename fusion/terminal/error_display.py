"""How errors look: on a terminal with coloured headings and wrapped between words, elsewhere plain."""

from __future__ import annotations

import re
import shutil
import sys

from fusion.terminal.spelling import as_typed
from fusion.terminal.streams import Unfailing, has_colours

# Escape sequences of ECMA-48: red, cyan, reset.
COLOURS = {"error: ": "\x1b[31m", "hint: ": "\x1b[36m"}
RESET = "\x1b[0m"
# A command in backticks counts as one word, so that it can be copied: the terminal itself breaks it if it is too long.
_WORD = re.compile(r"\S*`[^`]*`\S*|\S+")


def print_report(report: str) -> None:
    """Prints lines such as `error: …` and `hint: …` on standard error, with commands as the user types them."""
    stream, report = Unfailing(sys.stderr), as_typed(report)
    if stream.isatty():
        columns, coloured = shutil.get_terminal_size().columns, has_colours(stream)
        report = "\n".join(displayed(line, columns, coloured=coloured) for line in report.splitlines())
    stream.write(f"{report}\n")
    stream.flush()


def displayed(line: str, columns: int, *, coloured: bool) -> str:
    """The line for a terminal of so many columns. Only lines of an error and its hint are changed."""
    heading = next((one for one in COLOURS if line.startswith(one)), "")
    if not heading:
        return line
    text = _wrapped(line.removeprefix(heading), columns - len(heading)).replace("\n", "\n" + " " * len(heading))
    return f"{COLOURS[heading]}{heading.rstrip()}{RESET} {text}" if coloured else heading + text


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in _WORD.findall(text):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return "\n".join(lines)
