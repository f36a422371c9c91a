"""One line an event: `2026-01-02T03:04:05Z info run=… rank=0/8 epoch=3 step=1200/8000 loss=…`, flushed, on stderr.

A terminal gets short lines instead, `12:34:56 warning slow_store seconds=…` in colour, and a progress bar. Rank 0 says
everything, other ranks only warnings. What was said is kept in full, so that a run can store its log.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, Protocol, cast

from fusion.streams import Unfailing

# Escape sequences that every terminal with colours knows (ECMA-48): yellow, red, and back to normal.
COLOURS = {"warning": "\x1b[33m", "error": "\x1b[31m"}
NO_COLOUR = "\x1b[0m"


@dataclass
class _Context:
    run: str = "-"
    rank: int = 0
    world_size: int = 1
    lines: list[str] = field(default_factory=list)


_context = _Context()


def configure(run: str, rank: int, world_size: int) -> None:
    """Says whose lines these are from now on."""
    _context.run, _context.rank, _context.world_size = run, rank, world_size


def info(**fields: object) -> None:
    if _context.rank == 0:
        _emit("info", fields)


def warning(**fields: object) -> None:
    _emit("warning", fields)


def error(**fields: object) -> None:
    _emit("error", fields)


class Show(Protocol):
    def __call__(self, done: int, label: str | None = None) -> None:
        """Moves the bar, and changes what it says."""


def _show_nothing(done: int, label: str | None = None) -> None:
    """For other ranks, and where there is no terminal."""


@contextmanager
def progress(label: str, total: int, *, done: int = 0, estimates: bool = True) -> Iterator[Show]:
    """A bar on rank 0's terminal, below the log and gone at the end, to be moved on; elsewhere nothing.

    Args:
        done: how much of `total` was done before this process began.
        estimates: the bar adds the share done and the time left; otherwise the label says it all.
    """
    if _context.rank or not sys.stderr.isatty():
        yield _show_nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    label_alone = TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)
    columns = Progress.get_default_columns() if estimates else label_alone
    console = Console(file=cast(IO[str], Unfailing(sys.stderr)))
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(label, total=total, completed=done)

        def show(done: int, label: str | None = None) -> None:
            bars.update(task, completed=done, description=label)

        yield show


def text() -> str:
    """All lines of this process so far."""
    return "".join(f"{line}\n" for line in _context.lines)


def _emit(level: str, fields: dict[str, object]) -> None:
    now = datetime.now(UTC)
    line = _full_line(now, level, fields)
    _context.lines.append(line)
    stream = Unfailing(sys.stderr)
    shown = _short_line(now, level, fields) if stream.isatty() else line
    stream.write(f"{shown}\n")  # in one piece, unlike print: the ranks of a node share the stream
    stream.flush()


def _full_line(now: datetime, level: str, fields: dict[str, object]) -> str:
    who = {"run": _context.run, "rank": f"{_context.rank}/{_context.world_size}"}
    return " ".join([now.strftime("%Y-%m-%dT%H:%M:%SZ"), level, *_pairs(who | fields)])


def _short_line(now: datetime, level: str, fields: dict[str, object]) -> str:
    """For a person at a terminal: the local time, and the event's name in front of its facts."""
    facts = dict(fields)
    event = [_format(facts.pop("event"))] if "event" in facts else []
    if _context.world_size > 1:
        facts = {"rank": f"{_context.rank}/{_context.world_size}"} | facts
    return " ".join([now.astimezone().strftime("%H:%M:%S"), _coloured(level), *event, *_pairs(facts)])


def _coloured(level: str) -> str:
    """The level in its colour, unless NO_COLOR (no-color.org) or a terminal without colours forbids it."""
    colour = COLOURS.get(level)
    if colour is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return level
    return f"{colour}{level}{NO_COLOUR}"


def _pairs(fields: dict[str, object]) -> list[str]:
    return [f"{key}={_format(value)}" for key, value in fields.items()]


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    shown = str(value)
    is_plain = shown.isprintable() and not set(' "=') & set(shown)
    return shown if is_plain else json.dumps(shown, ensure_ascii=not shown.isprintable())
