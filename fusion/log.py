"""One line an event: `2026-01-02T03:04:05Z info run=… rank=0/8 epoch=3 step=1200/8000 loss=…`, flushed, on stderr.

On a terminal there is also a progress bar. Rank 0 says everything, other ranks only warnings. What was said is kept, so
that a run can store its log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, cast

from fusion.streams import Unfailing


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


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on rank 0's terminal, gone at the end, to be told how much is done; elsewhere nothing."""
    if _context.rank or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=cast(IO[str], Unfailing(sys.stderr))), transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda done: bars.update(task, completed=done)


def text() -> str:
    """All lines of this process so far."""
    return "".join(f"{line}\n" for line in _context.lines)


def _emit(level: str, fields: dict[str, object]) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    who = {"run": _context.run, "rank": f"{_context.rank}/{_context.world_size}"}
    line = " ".join([now, level, *(f"{key}={_format(value)}" for key, value in (who | fields).items())])
    _context.lines.append(line)
    stream = Unfailing(sys.stderr)
    stream.write(f"{line}\n")  # in one piece, unlike print: the ranks of a node share the stream
    stream.flush()


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    shown = str(value)
    is_plain = shown.isprintable() and not set(' "=') & set(shown)
    return shown if is_plain else json.dumps(shown, ensure_ascii=not shown.isprintable())
