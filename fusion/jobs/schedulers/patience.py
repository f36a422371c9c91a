"""Retries requests to a cluster that does not answer. The jobs there run on meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from fusion.errors import FusionError

T = TypeVar("T")


def retry(ask: Callable[[], T], seconds: float, pause: float, on: type[FusionError] = FusionError) -> T:
    """Calls `ask` until it succeeds; returns its result. Prints a message at the first failure only.

    Args:
        seconds: how long to retry, from the first failure on.
        pause: seconds between two calls.
        on: the class of errors that are retried; others are raised at once.

    Raises:
        FusionError: the last error of `ask`.
    """
    deadline: float | None = None
    while True:
        try:
            return ask()
        except on as error:
            now = time.monotonic()
            is_first = deadline is None
            deadline = now + seconds if deadline is None else deadline
            if now >= deadline:
                raise
            if is_first:
                print(f"{error.message}; retrying for up to {seconds:g} s", flush=True)
            time.sleep(pause)
