"""Tables on standard output.

Their text comes from users' data, buckets or clusters and is not trusted, so rich's markup is off and control
characters are escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

from rich import box
from rich.console import Console
from rich.table import Table as Table
from rich.text import Text

from fusion.terminal.escapes import visible

WIDEST = 10_000  # columns; in effect no limit
MIN_WIDTH = 80  # columns; a title may be wider than its table, and rich would wrap it at the table's width
PLAIN_WIDTH = 100  # columns of a table that is fitted to the terminal, if standard output is not a terminal


def console(plain_width: int = PLAIN_WIDTH) -> Console:
    """Standard output, as wide as the terminal; `plain_width` columns wide if it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else plain_width, highlight=False)


def table(
    title: str,
    *headings: str,
    numbers: Collection[str] = (),
    folded: Collection[str] = (),
    max_width: Mapping[str, int] | None = None,
) -> Table:
    """A table without rows.

    Args:
        numbers: headings of the columns that are right-aligned.
        folded: headings of the columns whose cells may be broken into lines; others never are, so that ids can be
            copied.
        max_width: heading to the characters at which cells are cut off.
    """
    made = Table(title=text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for heading in headings:
        made.add_column(
            text(heading),
            justify="right" if heading in numbers else "left",
            no_wrap=heading not in folded,
            overflow="fold" if heading in folded else "ellipsis",
            max_width=(max_width or {}).get(heading),
        )
    return made


def add(to: Table, *cells: str, style: str | None = None) -> None:
    to.add_row(*map(text, cells), style=style)


def width(of: Table) -> int:
    """Columns of the terminal that the whole table needs."""
    return Console(width=WIDEST).measure(of).maximum


def show(made: Table) -> None:
    Console(width=max(width(made), MIN_WIDTH), highlight=False).print(made)


def text(content: str, style: str = "") -> Text:
    return Text(visible(content), style)
