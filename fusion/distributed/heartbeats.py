"""Signs of life between ranks, so that a rank may work alone for as long as it takes.

While rank 0 reads, splits or publishes, the others wait inside a collective operation. How long that takes depends on
the data, so no fixed time limit is right: gloo's own would end ranks that only wait. Instead:

- Every rank has a key in the group's store. A thread counts it up every few seconds, whatever the rank does meanwhile.
- The same thread reads the counts of all ranks. A second one, which cannot hang in the network, ends this process with
  124 when a count has not changed for the stall timeout, and names that rank.
- Collective operations wait for days (`FOR_EVER`), and cost nothing more than before.
- A rank whose process has died closes its connections: who waits for it gets an error at once, without the store. The
  heartbeats find what closes nothing: a node without power or network, a process that is stopped.

The count says that a process lives, not that it gets on; that is the watchdog's part. A process is silent, too, while
a library holds Python's global lock without a break. A group of one has no threads and no store.
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

FOR_EVER = timedelta(days=365)  # gloo and nccl want a number
ARRIVAL = 600.0  # seconds for all ranks to come: nodes pull images and load torch at different speeds
BEAT = 5.0  # seconds between two heartbeats; with 1000 ranks the store answers 400 requests a second


class Heartbeats:
    """Gives this rank's signs of life, and watches those of the others.

    Args:
        store: the group's; it is asked over a connection of its own, so that nothing else delays a heartbeat.
        timeout: seconds of silence after which this process ends; 0: it never does.
        end: what ends this process.

    Raises:
        UnreachableError: not all ranks came.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout: float, end: Callable[[StalledError], None] = leave
    ) -> None:
        self.rank, self.timeout, self._end = rank, timeout, end
        self._store = _own_connection(store)
        self._keys = [f"{other}" for other in range(size)]
        self._counts: list[bytes] = []
        self._silence = [0.0] * size  # seconds, of this process's own time
        self._beat = min(BEAT, timeout / 10) if timeout else BEAT
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat_until_ended, self._watch)]
        self._arrive()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads; a thread that hangs in the network is left behind."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self._beat)

    def _arrive(self) -> None:
        try:
            self._store.add(self._keys[self.rank], 1)
            self._store.wait(self._keys, timedelta(seconds=ARRIVAL))
            self._counts = self._store.multi_get(self._keys)
        except DistStoreError as error:
            missing = [key for key in self._keys if not self._store.check([key])]
            raise UnreachableError(
                f"ranks {', '.join(missing)} did not come within {ARRIVAL:.0f} s",
                "see their logs; start all ranks within that time",
            ) from error

    def _beat_until_ended(self) -> None:
        try:
            while not self._ended.wait(self._beat):
                self._store.add(self._keys[self.rank], 1)
                self._counts = self._store.multi_get(self._keys)
        except RuntimeError as error:  # rank 0's node, which has the store, is gone: from here on all are silent
            if not self._ended.is_set():
                log.warning(event="heartbeats_lost", reason=str(error).splitlines()[0])

    def _watch(self) -> None:
        heard, last = self._counts, time.monotonic()
        while not self._ended.wait(self._beat):
            # A process that was suspended, with the others or alone, has not listened meanwhile: count what it did.
            passed, last = min(time.monotonic() - last, 2 * self._beat), time.monotonic()
            counts = self._counts
            self._count_silence(passed, [old == new for old, new in zip(heard, counts, strict=True)])
            heard = counts

    def _count_silence(self, passed: float, is_silent: list[bool]) -> None:
        for other, silent in enumerate(is_silent):
            self._silence[other] = self._silence[other] + passed if silent and other != self.rank else 0.0
        longest = max(self._silence)
        if self.timeout and longest > self.timeout:
            # With the store gone all are silent: the first is rank 0, which has it or shares a node with it.
            self._end(_stalled(self._silence.index(longest), longest))


def _stalled(silent: int, seconds: float) -> StalledError:
    log.error(event="rank_silent", silent=silent, seconds=seconds)
    return StalledError(
        f"rank {silent} has given no sign of life for {seconds:.0f} s",
        "look for what happened to its node, then run the same command again",
    )


def _own_connection(store: Store) -> Store:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    assert isinstance(store, TCPStore), "ranks meet at a TCPStore"
    own = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher's store may outlive the ranks of one try
    return PrefixStore(f"heartbeats/{restart}", own)
