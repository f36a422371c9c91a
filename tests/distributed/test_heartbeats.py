"""Ranks wait for one that works for as long as it gives signs of life, and for no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore

from fusion.distributed import heartbeats
from fusion.distributed.heartbeats import Heartbeats
from fusion.errors import StalledError, UnreachableError

TIMEOUT = 0.5  # seconds


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Ranks:
    """The heartbeats of three ranks in one process, and how each was ended."""

    def __init__(self, store: TCPStore, timeout: float) -> None:
        self.ended: dict[int, str] = {}
        self.has_ended = threading.Event()
        with ThreadPoolExecutor(3) as pool:
            self.all = list(pool.map(lambda rank: Heartbeats(store, rank, 3, timeout, self._end(rank)), range(3)))

    def _end(self, rank: int) -> Callable[[StalledError], None]:
        def end(error: StalledError) -> None:
            self.ended.setdefault(rank, error.message)
            self.has_ended.set()

        return end

    def stop(self) -> None:
        for each in self.all:
            each.stop()


@pytest.fixture
def ranks(store: TCPStore) -> Iterator[Ranks]:
    made = Ranks(store, TIMEOUT)
    yield made
    made.stop()


def test_living_ranks_are_waited_for(ranks: Ranks) -> None:
    assert not ranks.has_ended.wait(4 * TIMEOUT)


def test_other_ranks_name_a_rank_without_heartbeats(ranks: Ranks) -> None:
    ranks.all[2].stop()
    assert ranks.has_ended.wait(20 * TIMEOUT)
    time.sleep(TIMEOUT)
    assert set(ranks.ended) == {0, 1}
    assert all("rank 2 has sent no heartbeat" in message for message in ranks.ended.values())


def test_if_the_store_hangs_rank_0_is_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its node has lost its power: the request never comes back."""
    hang = threading.Event()
    monkeypatch.setattr(PrefixStore, "add", lambda *_: hang.wait())
    assert ranks.has_ended.wait(20 * TIMEOUT)
    time.sleep(TIMEOUT)  # the first to end may be rank 0 itself, which names another
    assert any("rank 0 has sent no heartbeat" in message for message in ranks.ended.values())
    hang.set()


def test_a_timeout_of_0_waits_forever(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "BEAT", 0.02)
    ranks = Ranks(store, 0)
    ranks.all[2].stop()
    assert not ranks.has_ended.wait(0.5)
    ranks.stop()


def test_a_suspended_process_does_not_blame_the_others(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it goes on, the clock has moved by an hour in which it has listened to nobody."""
    now = time.monotonic
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now() + 3600)
    assert not ranks.has_ended.wait(2 * TIMEOUT)


def test_missing_ranks_are_named(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "ARRIVAL_TIMEOUT", 0.2)
    with pytest.raises(UnreachableError, match="ranks 1, 2 did not join within 0 s"):
        Heartbeats(store, 0, 3, TIMEOUT)


def test_a_restart_uses_new_heartbeat_counters(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's store has those of the try before, whose ranks are gone."""
    Ranks(store, TIMEOUT).stop()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(heartbeats, "ARRIVAL_TIMEOUT", 0.2)
    with pytest.raises(UnreachableError, match="ranks 1, 2 did not join"):
        Heartbeats(store, 0, 3, TIMEOUT)
