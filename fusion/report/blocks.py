"""What a page is made of: sections with sentences, charts, tables and commands. The templates render them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fusion.metrics import LARGE, TINY
from fusion.terminal.escapes import visible

ABSENT = "–"  # in place of a figure that is not known


@dataclass(frozen=True)
class Table:
    """A table; the first column names its row.

    Attributes:
        caption: what it shows; also the name of its scrollable region.
        numbers: index of the columns that are numbers, which are aligned at the right.
        code: index of the columns that are set as code.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    numbers: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chart:
    """A chart with its title, its unit and the table behind it."""

    title: str
    subtitle: str
    svg: Markup
    table: Table
    note: str = ""
    is_tall: bool = False


@dataclass(frozen=True)
class Command:
    """A command to paste, and what it does."""

    what: str
    text: str


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        lead: what it says, in sentences, before all charts.
        files: the files of the run that its figures come from.
        hidden: tables that are folded away.
    """

    id: str
    title: str
    lead: Sequence[str]
    files: Sequence[str]
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    hidden: Sequence[Table] = ()
    commands: Sequence[Command] = ()

    @property
    def behind(self) -> list[Table]:
        """The tables behind the charts, each once, unless they are in `tables`."""
        found = [chart.table for chart in self.charts if chart.table not in self.tables]
        return [table for i, table in enumerate(found) if table not in found[:i]]

    @property
    def folded(self) -> list[Table]:
        """The tables that a page folds away: those behind the charts, and then `hidden`."""
        return [*self.behind, *self.hidden]


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table: with thousands separators, and a true minus sign; a dash if it is not known."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:,.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    return ABSENT if value is None or not math.isfinite(value) else f"{number(value, digits)}%"


def dollars(value: float | None) -> str:
    """A price: with cents below $1,000, and two significant digits if it is tiny."""
    if value is None or not math.isfinite(value):
        return ABSENT
    sign, size = "−" if value < 0 else "", abs(value)
    if 0 < size < TINY / 10:
        return f"{sign}${size:.2g}"
    return f"{sign}${size:,.0f}" if size >= LARGE else f"{sign}${size:,.2f}"


def between(low: float | None, high: float | None, digits: int = 1) -> str:
    """An interval, such as 29.9 – 33.2; with "to" beside a minus sign, which looks like a dash."""
    if low is None or high is None:
        return ABSENT
    return f"{number(low, digits)} {'to' if low < 0 else '–'} {number(high, digits)}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def counted(n: int, singular: str, plural: str = "") -> str:
    """For example "1 row" or "1,600 rows"."""
    return f"{n:,} {singular if n == 1 else plural or f'{singular}s'}"


def shortened(text: str, length: int) -> str:
    """Text of a user, printable, cut after so many characters."""
    shown = visible(" ".join(text.split()))
    return shown if len(shown) <= length else f"{shown[: length - 1].rstrip()}…"


def listed(words: Sequence[str]) -> str:
    """For example "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def prose(text: str) -> Markup:
    """A sentence as HTML: everything is escaped, and what is between backticks is set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
