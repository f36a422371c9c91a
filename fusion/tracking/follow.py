"""Calls the trackers of a run, each in a thread of its own, such that none of them can disturb the training."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fusion import log
from fusion.command.settings import to_json
from fusion.config import RunConfig
from fusion.errors import StopRequested
from fusion.records.run import RunFolder, flat
from fusion.tracking.protocol import State, Tracker

# Seconds that the end of a training waits for trackers. A job that was asked to stop is killed after --grace, by
# default a minute, most of which its last checkpoint may need.
PATIENCE: dict[State, float] = {"finished": 30.0, "failed": 5.0, "stopped": 5.0}
# A tracker is slow if so many calls wait for it, and it has not done one for so many seconds. A first call may take
# some seconds, in which the tracker imports its packages and connects; epochs may take less.
BACKLOG, SLOW_SECONDS = 3, 20.0


class Follower:
    """Calls one tracker in a thread. After an error, it warns and calls the tracker no more."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._done, self._is_slow, self._moved = threading.Event(), False, time.monotonic()
        # A daemon: Python waits for other threads at its exit, and a tracker may hang for ever.
        threading.Thread(target=self._work, name=f"tracker {name}", daemon=True).start()

    def call(self, method: str, *arguments: Any) -> None:
        """Calls a method of the tracker after those that wait already; returns at once."""
        waits = self._calls.qsize() >= BACKLOG and time.monotonic() - self._moved > SLOW_SECONDS
        if waits and not self._is_slow and not self._done.is_set():
            self._is_slow = True
            log.warning(event="tracker_slow", tracker=self.name, waiting=self._calls.qsize())
        self._calls.put((method, arguments))

    def wait(self, seconds: float) -> None:
        """Waits for `end`, which was called before; after these seconds, warns and leaves the tracker alone."""
        if not self._done.wait(seconds):
            log.warning(event="tracker_not_done", tracker=self.name, seconds=seconds)

    def _work(self) -> None:
        method = ""
        try:
            while method != "end":
                method, arguments = self._calls.get()
                self._moved = time.monotonic()
                getattr(self.tracker, method)(*arguments)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            log.warning(event="tracker_failed", tracker=self.name, call=method, reason=reason)
        finally:
            self._done.set()


@dataclass
class Followers:
    """All trackers of a run.

    Attributes:
        summary: passed to their `end`: the SMAPE of the kept weights, and of the baselines.
    """

    followers: Sequence[Follower] = ()
    summary: dict[str, float] = field(default_factory=dict)

    def epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        """Reports an epoch, numbered from 1."""
        for one in self.followers:
            one.call("epoch", number, dict(metrics))

    def end(self, state: State, report: str) -> None:
        """Reports the end, and waits until the trackers have recorded it, but not for long."""
        for one in self.followers:
            one.call("end", state, dict(self.summary), report)
        deadline = time.monotonic() + PATIENCE[state]
        for one in self.followers:
            one.wait(max(0.0, deadline - time.monotonic()))


def figures(entry: Mapping[str, Any]) -> dict[str, float]:
    """What trackers get of an epoch's entry in the history of the training."""
    return {name: float(entry[name]) for name in ("loss", "lr", "step", "smape")}


@contextmanager
def following(config: RunConfig, trackers: Mapping[str, Tracker]) -> Iterator[Followers]:
    """Starts the trackers, and reports to them how the block ended.

    Args:
        trackers: by name, as of `trackers_of`; empty on all ranks but 0.
    """
    run = RunFolder.of(config)
    followers = Followers([Follower(name, tracker) for name, tracker in trackers.items()])
    if trackers:
        settings = dict(flat(json.loads(to_json(config))))
        for one in followers.followers:
            one.call("start", config.name(), dict(settings), run.url)
    state: State = "failed"
    try:
        yield followers
        state = "finished"
    except StopRequested:
        state = "stopped"
        raise
    finally:
        followers.end(state, run.report_url)
