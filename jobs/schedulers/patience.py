"""Asks a cluster again when it does not answer: a job that is waited for runs on, whatever happens to who waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from fusion.errors import FusionError

T = TypeVar("T")


def patiently(ask: Callable[[], T], seconds: float, pause: float, retried: type[FusionError] = FusionError) -> T:
    """The answer of a cluster, asked for again every `pause` seconds until it failed for `seconds`; says so once.

    Args:
        retried: errors after which it is asked again.

    Raises:
        FusionError: what `ask` raised last.
    """
    deadline: float | None = None
    while True:
        try:
            return ask()
        except retried as error:
            now = time.monotonic()
            is_first = deadline is None
            deadline = now + seconds if deadline is None else deadline
            if now >= deadline:
                raise
            if is_first:
                print(f"{error.message}; asking again for up to {seconds:g} s", flush=True)
            time.sleep(pause)
