"""Progress bars on a terminal; `fusion.log.progress` decides whether to show one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from fusion.terminal.streams import WRITING, Unfailing

Show = Callable[..., None]


class Rate(ProgressColumn):
    """How many of something are done, and how many per second, such as `120,000/2,000,000 rows 41,200/s`."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        shown = f"{task.completed:,.0f}/{task.total or 0:,.0f} {self.unit}"
        return Text(f"{shown} {speed:,.0f}/s" if speed else shown, style="progress.download")


@contextmanager
def shown(label: str, total: int, *, done: int, kind: str | None, delay: float) -> Iterator[Show]:
    """Shows a bar until the block ends; arguments as for `fusion.log.progress`.

    Args:
        kind: what `total` counts; "" if that is not to be shown, None for the label alone.
    """
    console = Console(file=cast(IO[str], Unfailing(sys.stderr)))
    bars = Progress(*_columns(kind), console=console, transient=True, expand=kind is None)
    task = bars.add_task(label, total=total or None, completed=done)

    def start() -> None:
        with WRITING:
            bars.start()

    appears = threading.Timer(delay, start)
    appears.daemon = True
    if delay:
        appears.start()
    else:
        start()

    def show(done: int, label: str | None = None) -> None:
        bars.update(task, completed=done, description=label)

    try:
        yield show
    finally:
        appears.cancel()
        if appears.ident is not None:
            appears.join()  # it might be starting the bar just now
        with WRITING:
            bars.stop()


def _columns(kind: str | None) -> list[ProgressColumn]:
    label = TextColumn("{task.description}", markup=False)
    if kind is None:
        return [label, BarColumn(bar_width=None)]
    if kind == "seconds":
        return [SpinnerColumn(), label, TimeElapsedColumn()]
    bar: list[ProgressColumn] = [label, BarColumn(bar_width=20), TaskProgressColumn()]
    if kind == "bytes":
        return [*bar, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True)]
    return [*bar, *([Rate(kind)] if kind else []), TimeRemainingColumn(compact=True)]
