"""Tables on standard output.

Their text comes from users' data, buckets or clusters and is not trusted, so rich's markup is off and control
characters are escaped.
"""

from __future__ import annotations

from collections.abc import Collection

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion.errors import visible

WIDEST = 10_000  # columns; in effect no limit
MIN_WIDTH = 80  # columns; a title may be wider than its table, and rich would wrap it at the table's width


def table(title: str, *headings: str, numbers: Collection[str] = ()) -> Table:
    """A table without rows; the columns with the headings `numbers` are right-aligned."""
    made = Table(title=text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for heading in headings:
        # Cells are never wrapped, so that ids can be copied.
        made.add_column(text(heading), justify="right" if heading in numbers else "left", no_wrap=True)
    return made


def add(to: Table, *cells: str, style: str | None = None) -> None:
    to.add_row(*map(text, cells), style=style)


def width(of: Table) -> int:
    """Columns of the terminal that the whole table needs."""
    return Console(width=WIDEST).measure(of).maximum


def show(made: Table) -> None:
    Console(width=max(width(made), MIN_WIDTH), highlight=False).print(made)


def text(content: str) -> Text:
    return Text(visible(content))
