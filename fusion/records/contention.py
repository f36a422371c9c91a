"""Retries a compare-and-swap write that other writers of the same object keep winning, for a limited time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from fusion import signals
from fusion.errors import StopRequested, UnreachableError

# Only a few jobs ever write the same object at once. A writer that loses 25 times has met a broken store instead, for
# example one that reports an object as removed and still has it. All waits together take about 10 s on average.
MOST_TURNS = 25
# Seconds. The first wait is about as long as one request to a store; waits double up to the longest.
FIRST_WAIT, LONGEST_WAIT = 0.02, 1.0


def turns(url: str) -> Iterator[None]:
    """Yields once per try to write the object, after a growing random wait; the caller leaves the loop on success.

    Raises:
        StopRequested: a signal asked this process to stop between two tries.
        UnreachableError: another writer won at every try.
    """
    for turn in range(MOST_TURNS):
        if turn:
            _wait(url, min(LONGEST_WAIT, FIRST_WAIT * 2**turn))
        yield
    raise UnreachableError(
        f"{url} was changed by others at each of {MOST_TURNS} tries",
        "wait until the other jobs that write it have ended, then run the same command again",
    )


def _wait(url: str, longest: float) -> None:
    if signals.requested():
        raise StopRequested(f"stopped on request while other jobs were writing {url}", "run the same command again")
    time.sleep(random.uniform(0, longest))  # random, so that two writers do not collide again and again
