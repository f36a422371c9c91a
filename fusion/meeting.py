"""Where the ranks of a run find one another, on one node or on several, and launchers tell how theirs ended."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

from fusion.errors import StopRequested, UnreachableError, UsageError
from fusion.ranks import ECHO, POLL, SETTLE, Ending, Stop

MEET = 600.0  # seconds that the launchers wait for node 0: nodes pull images at different speeds
LEAVE = 300.0  # seconds that a node whose ranks are done waits for the other nodes, as torch's agents do


class Meeting:
    """Where the ranks of one node find one another: a port that is theirs, also from one attempt to the next."""

    def __init__(self) -> None:
        # Bound but not listening: the kernel gives the port to nobody else, and rank 0 can listen on it.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("", 0))

    def environment(self) -> dict[str, str]:
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._reserved.getsockname()[1])}

    def warn(self) -> None:
        """Tells the other nodes that a rank has failed here."""

    def is_failing(self) -> bool:
        """Whether a rank has failed on another node."""
        return False

    def conclude(self, ending: Ending, stop: Stop) -> Ending:
        """How all nodes ended, given how this one did."""
        return ending


class NodesMeeting(Meeting):
    """A store on node 0: there the ranks of all nodes find one another, and the launchers tell how theirs ended."""

    def __init__(self, node: int, n_nodes: int, address: tuple[str, int], grace: float, stop: Stop) -> None:
        from torch._C._distributed_c10d import TCPStore  # loads in seconds, and a single node does without

        self._node, self._n, self._address, self._grace = node, n_nodes, address, grace
        self._endings: dict[int, Ending] = {}
        self._failing = False
        if self._node == 0:
            try:
                self._server = TCPStore("localhost", address[1], is_master=True, wait_for_workers=False)
            except RuntimeError as error:
                message = f"node 0 cannot listen on port {address[1]}: {str(error).splitlines()[0]}"
                raise UsageError(message, "choose another --master-port, the same on all nodes") from None
        _reach(*self._address, stop)
        self._store = TCPStore(*self._address, is_master=False, timeout=timedelta(seconds=30))
        threading.Thread(target=self._listen, daemon=True).start()

    def environment(self) -> dict[str, str]:
        address, port = self._address
        return {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def warn(self) -> None:
        with suppress(RuntimeError):  # node 0 is gone: there is nobody left to tell
            self._store.set("fusion/failing", "yes")

    def is_failing(self) -> bool:
        return self._failing

    def conclude(self, ending: Ending, stop: Stop) -> Ending:
        if ending.failed:
            self.warn()
        with suppress(RuntimeError):
            self._store.set(f"fusion/ended/{self._node}", json.dumps(asdict(ending)))
        self._wait_for_nodes(ending, stop)
        known = [ending, *self._endings.values()]
        self._leave()
        return min((other for other in known if other.failed), default=ending)

    def _listen(self) -> None:
        try:
            while len(self._endings) < self._n:
                self._failing = self._failing or self._store.check(["fusion/failing"])
                for node in set(range(self._n)) - set(self._endings):
                    if self._store.check([key := f"fusion/ended/{node}"]):
                        self._endings[node] = Ending(**json.loads(self._store.get(key)))
                time.sleep(4 * POLL)
        except RuntimeError:
            if 0 not in self._endings:
                report = "error: lost the connection to node 0\nto do: see the log of node 0"
                self._endings[0] = Ending(ECHO, time.time(), 128 + signal.SIGKILL, report)
                self._failing = True

    def _wait_for_nodes(self, ending: Ending, stop: Stop) -> None:
        start = time.monotonic()
        while len(self._endings) < self._n:
            on_request = self._grace if ending.code or stop.name else LEAVE
            if time.monotonic() > start + (SETTLE + 1 if ending.failed or self._failing else on_request):
                return
            time.sleep(POLL)

    def _leave(self) -> None:
        # The store ends with node 0, so node 0 leaves last.
        with suppress(RuntimeError):
            n_left = self._store.add("fusion/left", 1)
            deadline = time.monotonic() + SETTLE
            while self._node == 0 and n_left < self._n and time.monotonic() < deadline:
                time.sleep(POLL)
                n_left = self._store.add("fusion/left", 0)


def _reach(address: str, port: int, stop: Stop) -> None:
    # Until node 0 has started its name may not resolve, and then nobody may listen there.
    deadline = time.monotonic() + MEET
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if stop.name:
                raise StopRequested(f"got {stop.name} while waiting for node 0", "run the same command again") from None
            if time.monotonic() > deadline:
                message = f"node 0 did not answer at {address}:{port} within {MEET:.0f} s: {error}"
                raise UnreachableError(message, "start node 0, or correct --master-addr and --master-port") from None
            time.sleep(0.5)
