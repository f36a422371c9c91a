"""Several writers of one object: each tries again when another was faster, but not for ever."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from fusion import signals
from fusion.errors import StopRequested, UnreachableError

# Writers of one object are a few attempts or nights: one that loses this often fights with something that is broken,
# such as a store that says it has removed an object and still has it. The waits add up to about 10 s.
MOST_TURNS = 25
FIRST_WAIT, LONGEST_WAIT = 0.02, 1.0  # seconds


def turns(url: str) -> Iterator[None]:
    """Yields for each try to write the object; the caller leaves the loop when it has succeeded.

    Raises:
        StopRequested: a signal came while others were faster.
        UnreachableError: others were faster each time.
    """
    for turn in range(MOST_TURNS):
        if turn:
            _wait(url, min(LONGEST_WAIT, FIRST_WAIT * 2**turn))
        yield
    raise UnreachableError(
        f"{url} was changed by others at each of {MOST_TURNS} tries",
        "run it again once other jobs that write it end",
    )


def _wait(url: str, longest: float) -> None:
    if signals.requested():
        raise StopRequested(f"stopped on request while others were writing {url}", "run the same command again")
    time.sleep(random.uniform(0, longest))  # not in step with the others
