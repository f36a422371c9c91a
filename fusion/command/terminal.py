"""Tables on standard output, of text that a user's data, a bucket or a cluster holds.

It is shown, never obeyed: markup is off, and control characters are written out.
"""

from __future__ import annotations

from collections.abc import Collection

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.errors import visible

WIDEST = 10_000  # columns: no limit
MIN_WIDTH = 80  # columns for the titles, which are no part of a table's own width


def table(title: str, *headings: str, numbers: Collection[str] = ()) -> Table:
    """An empty table; the columns of `numbers` are aligned on the right."""
    made = Table(title=text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for heading in headings:
        # Never wrapped: half of an id cannot be copied.
        made.add_column(text(heading), justify="right" if heading in numbers else "left", no_wrap=True)
    return made


def add(to: Table, *cells: str, style: str | None = None) -> None:
    to.add_row(*map(text, cells), style=style)


def width(of: Table) -> int:
    """Columns that it takes to show all of it."""
    return Console(width=WIDEST).measure(of).maximum


def show(made: Table) -> None:
    Console(width=max(width(made), MIN_WIDTH), highlight=False).print(made)


def text(content: str) -> Text:
    return Text(visible(content))
