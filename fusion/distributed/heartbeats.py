"""Heartbeats between ranks, which find ranks that are lost, however long others work alone.

While rank 0 reads, splits or publishes, the other ranks wait inside a collective operation. How long that takes depends
on the data, so no fixed timeout of collective operations is right: gloo's would end ranks that only wait. Instead:

- Every rank has a counter in the group's store. A thread increments it every few seconds, whatever the rank is doing.
- The same thread reads the counters of all ranks. A second thread, which makes no network calls and so cannot hang in
  one, ends this process with exit code 124 if a counter has not changed for the stall timeout, and names its rank.
- Collective operations have a timeout of a year (`NO_TIMEOUT`).
- If a rank's process dies, its connections close, and a rank that waits for it gets an error at once, without
  heartbeats. These find the other cases: a node that lost power or network, or a suspended process.

A heartbeat shows that a process is alive, not that it makes progress; the watchdog checks progress. Heartbeats also
stop while a library holds Python's global interpreter lock without a break. A single rank has no threads and no store.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistStoreError

from fusion import log
from fusion.command.exit import leave
from fusion.errors import StalledError, UnreachableError

NO_TIMEOUT = timedelta(days=365)  # gloo and nccl have no value for "no timeout"
ARRIVAL_TIMEOUT = 600.0  # seconds for all ranks to join; nodes pull images and load torch at different speeds
BEAT = 5.0  # seconds between two heartbeats; 1000 ranks then make 400 requests per second to the store


class Heartbeats:
    """Sends the heartbeats of this rank, and watches those of the other ranks.

    Args:
        store: the group's store. Heartbeats use a separate connection to it, so that nothing else delays them.
        timeout: seconds without a heartbeat of another rank after which this process ends; 0: it never does.
        end: function that ends this process.

    Raises:
        UnreachableError: not all ranks have joined in time.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout: float, end: Callable[[StalledError], None] = leave
    ) -> None:
        self.rank, self.timeout, self._end = rank, timeout, end
        self._store = _own_connection(store)
        self._keys = [f"{other}" for other in range(size)]
        self._counts: list[bytes] = []
        self._silence = [0.0] * size  # seconds since the last heartbeat of each rank, while this process was running
        # A short timeout gets shorter beats, so that a single late heartbeat never counts as a stall.
        self._beat = min(BEAT, timeout / 10) if timeout else BEAT
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat_until_ended, self._watch)]
        self._arrive()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads. A thread that hangs in a network call is not waited for; it ends with the process."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self._beat)

    def _arrive(self) -> None:
        try:
            self._store.add(self._keys[self.rank], 1)
            self._store.wait(self._keys, timedelta(seconds=ARRIVAL_TIMEOUT))
            self._counts = self._store.multi_get(self._keys)
        except DistStoreError as error:
            missing = [key for key in self._keys if not self._store.check([key])]
            raise UnreachableError(
                f"ranks {', '.join(missing)} did not join within {ARRIVAL_TIMEOUT:.0f} s",
                "see their logs; start all ranks within that time",
            ) from error

    def _beat_until_ended(self) -> None:
        try:
            while not self._ended.wait(self._beat):
                self._store.add(self._keys[self.rank], 1)
                self._counts = self._store.multi_get(self._keys)
        except RuntimeError as error:  # the store, which is on rank 0's node, is gone; no more heartbeats arrive
            if not self._ended.is_set():
                log.warning(event="heartbeats_lost", reason=str(error).splitlines()[0])

    def _watch(self) -> None:
        heard, last = self._counts, time.monotonic()
        while not self._ended.wait(self._beat):
            # If this process was suspended, it could not notice heartbeats. So a pass counts for at most two beats.
            passed, last = min(time.monotonic() - last, 2 * self._beat), time.monotonic()
            counts = self._counts
            self._count_silence(passed, [old == new for old, new in zip(heard, counts, strict=True)])
            heard = counts

    def _count_silence(self, passed: float, is_silent: list[bool]) -> None:
        for other, silent in enumerate(is_silent):
            self._silence[other] = self._silence[other] + passed if silent and other != self.rank else 0.0
        longest = max(self._silence)
        if self.timeout and longest > self.timeout:
            # If the store is gone, all ranks seem silent. Then `index` finds rank 0, whose node has the store.
            self._end(_stalled(self._silence.index(longest), longest))


def _stalled(silent: int, seconds: float) -> StalledError:
    log.error(event="rank_silent", silent=silent, seconds=seconds)
    return StalledError(
        f"rank {silent} has sent no heartbeat for {seconds:.0f} s",
        "find out what happened to its node, then run the same command again",
    )


def _own_connection(store: Store) -> Store:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    assert isinstance(store, TCPStore), "the rendezvous of ranks uses a TCPStore"
    own = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    # The store of a launcher outlives the ranks, so the counters of each restart need names of their own.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"heartbeats/{restart}", own)
