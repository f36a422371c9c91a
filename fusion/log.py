"""Structured log on stderr, with one flushed line per event.

A line is `2026-01-02T03:04:05Z info run=… rank=0/8 epoch=3 step=1200/8000 loss=…`.
On a terminal, lines are shorter and coloured, such as `12:34:56 warning slow_store seconds=…`, and there is a progress
bar. Rank 0 logs everything, the other ranks only warnings and errors. All full lines are kept in memory, so that a run
can store its log.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

from fusion.terminal.spelling import as_typed
from fusion.terminal.streams import WRITING, Unfailing, has_colours

# Escape sequences of ECMA-48, which all colour terminals support: yellow, red, and reset.
COLOURS = {"warning": "\x1b[33m", "error": "\x1b[31m"}
NO_COLOUR = "\x1b[0m"
SLOW_SECONDS = 5.0  # what takes less shows no bar: the lines of the log follow each other fast enough
FOLDED = " " * 9  # before the further lines of an event, which are below its level

Level = Literal["info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("info", "warning", "error")  # the least important first


@dataclass
class _Context:
    run: str = "-"
    rank: int = 0
    world_size: int = 1
    has_bar: bool = False
    lines: list[str] = field(default_factory=list)
    least: Level = "info"
    is_short: bool = False
    is_separate: bool = False


_context = _Context()


def configure(run: str, rank: int, world_size: int) -> None:
    """Sets the run and rank that all later lines name."""
    _context.run, _context.rank, _context.world_size = run, rank, world_size


@contextmanager
def separate(least: Level = "info", *, short: bool = False) -> Iterator[None]:
    """Inside the block, the process has a log of its own; afterwards, the log is as it was before.

    So several trainings in one process do not store the lines of each other.

    Args:
        least: the least important level that is shown. All lines are kept.
        short: whether lines are as short as on a terminal even where standard error is none, as in a notebook.
    """
    global _context  # noqa: PLW0603 (as the other functions of this module, it is about the log of the process)
    before = _context
    _context = _Context(least=least, is_short=short, is_separate=True)
    try:
        yield
    finally:
        _context = before


def is_separate() -> bool:
    """Whether this is inside `separate`: then a call from Python logs, which prints nothing on standard output."""
    return _context.is_separate


def info(**fields: object) -> None:
    if _context.rank == 0:
        _emit("info", fields)


def store(**fields: object) -> None:
    """Adds a line to the log that a run stores, without showing it."""
    _context.lines.append(_full_line(datetime.now(UTC), "info", fields))


def warning(**fields: object) -> None:
    _emit("warning", fields)


def error(**fields: object) -> None:
    _emit("error", fields)


class Show(Protocol):
    def __call__(self, done: int, label: str | None = None) -> None:
        """Moves the bar to `done`, and changes its label if one is given."""


def _show_nothing(done: int, label: str | None = None) -> None:
    """A `Show` for ranks other than 0, and for output that is not a terminal."""


@contextmanager
def progress(
    label: str, total: int, *, done: int = 0, estimates: bool = True, unit: str = "", delay: float = 0.0
) -> Iterator[Show]:
    """Shows a progress bar on rank 0's terminal, below the log, until the block ends; elsewhere does nothing.

    Yields a function that moves the bar. Inside the block of another bar, nothing is shown.

    Args:
        done: how much of `total` was done before this process started.
        estimates: whether the bar also shows the share done and the time left; if not, only the label.
        unit: of `total`, such as "rows", to show the number per second; "bytes" are shown as MB.
        delay: seconds after which the bar appears, so that what takes less time shows none.
    """
    is_hidden = _context.least != LEVELS[0] or _context.has_bar
    if _context.rank or is_hidden or not sys.stderr.isatty():
        yield _show_nothing
        return
    from fusion.terminal import bars  # which loads rich

    _context.has_bar = True
    try:
        with bars.shown(label, total, done=done, kind=unit if estimates else None, delay=delay) as show:
            yield show
    finally:
        _context.has_bar = False


@contextmanager
def waiting(label: str, delay: float = SLOW_SECONDS) -> Iterator[None]:
    """Shows on rank 0's terminal for how long the block has been going on, once it takes more than `delay` seconds."""
    with progress(label, 0, unit="seconds", delay=delay):
        yield


def text() -> str:
    """All lines that this process has logged so far."""
    return "".join(f"{line}\n" for line in _context.lines)


def _emit(level: Level, fields: dict[str, object]) -> None:
    now = datetime.now(UTC)
    line = _full_line(now, level, fields)
    _context.lines.append(line)
    if LEVELS.index(level) < LEVELS.index(_context.least):
        return
    with WRITING:
        stream = Unfailing(sys.stderr)
        shown = _short_line(now, level, fields) if _context.is_short or stream.isatty() else line
        stream.write(f"{shown}\n")  # one write, unlike print: the ranks of a node share the stream; lines must not mix
        stream.flush()


def _full_line(now: datetime, level: str, fields: dict[str, object]) -> str:
    who = {"run": _context.run, "rank": f"{_context.rank}/{_context.world_size}"}
    return " ".join([now.strftime("%Y-%m-%dT%H:%M:%SZ"), level, *_pairs(who | fields)])


def _short_line(now: datetime, level: str, fields: dict[str, object]) -> str:
    """The line for a terminal: local time, level, event name, and the other fields."""
    facts = dict(fields)
    event = [_format(facts.pop("event"))] if "event" in facts else []
    if _context.world_size > 1 and level != LEVELS[0]:  # rank 0 alone logs lines of the first level
        facts = {"rank": f"{_context.rank}/{_context.world_size}"} | facts
    begin = f"{now.astimezone():%H:%M:%S} {level}"
    short = {key: _rounded(value) if isinstance(value, float) else value for key, value in facts.items()}
    shown = _folded([begin, *event, *_pairs(short)], _width())
    return shown.replace(level, _coloured(level), 1)


def _rounded(value: float) -> str:
    """Four digits: all that a person reads at a glance. The log that a run stores has six."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _width() -> int:
    """Columns of the terminal that is standard error; 0 if it does not say, as a pseudo-terminal without a size."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


def _folded(words: list[str], width: int) -> str:
    """The words in lines of at most `width` columns, so that no word is cut by the terminal; 0: in one line."""
    lines = [words[0]]
    for word in words[1:]:
        if width and len(lines[-1]) + 1 + len(word) > width:
            lines.append(FOLDED + word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _coloured(level: str) -> str:
    """The level in its colour, if standard error can show it."""
    colour = COLOURS.get(level)
    if colour is None or not has_colours(Unfailing(sys.stderr)):
        return level
    return f"{colour}{level}{NO_COLOUR}"


def _pairs(fields: dict[str, object]) -> list[str]:
    return [f"{key}={_format(value)}" for key, value in fields.items()]


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    shown = as_typed(str(value))
    is_plain = shown.isprintable() and not set(' "=') & set(shown)
    return shown if is_plain else json.dumps(shown, ensure_ascii=not shown.isprintable())
