"""Where the ranks of a run find one another, on one node or on several, and launchers tell how theirs ended."""

from __future__ import annotations

import errno
import json
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

from fusion.errors import ConfigError, StopRequested, UnreachableError, UsageError
from fusion.launch.processes import GONE, POLL, SETTLE, Ending, Stop

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

MEET = 600.0  # seconds that the launchers wait for one another: nodes pull images at different speeds
LEAVE = 300.0  # seconds that a node whose ranks are done waits for the other nodes, as torch's agents do


def _reserve() -> socket.socket:
    """A socket at a free port of the loopback interface, by its number: no name needs to resolve.

    Raises:
        ConfigError: there is no such interface; ranks would look for one another for minutes.
    """
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with suppress(OSError):
            reserved = socket.socket(family)
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind((address, 0))
            if _is_reachable(reserved):
                return reserved
            reserved.close()
    raise ConfigError("neither 127.0.0.1 nor ::1 can be reached on this machine", "bring it up: ip link set lo up")


def _is_reachable(reserved: socket.socket) -> bool:
    # Nobody listens there yet, so the right answer is a refusal. An interface that is down gives none.
    with socket.socket(reserved.family) as probe:
        probe.settimeout(5)
        return probe.connect_ex(reserved.getsockname()) in (0, errno.ECONNREFUSED)


def _loopback() -> str:
    with _reserve() as reserved:
        return str(reserved.getsockname()[0])


class Meeting:
    """Where the ranks of one node find one another: a port that is theirs, also from one attempt to the next."""

    def __init__(self) -> None:
        # Bound but not listening: the kernel gives the port to nobody else, and rank 0 can listen on it.
        self._reserved = _reserve()

    def environment(self) -> dict[str, str]:
        address, port = self._reserved.getsockname()[:2]
        return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}

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

        self._node, self._n, self._address, self._grace, self._stop = node, n_nodes, address, grace, stop
        self._endings: dict[int, Ending] = {}
        self._over = self._failing = False
        if self._node == 0:
            try:
                self._server = TCPStore(_loopback(), address[1], is_master=True, wait_for_workers=False)
            except RuntimeError as error:
                message = f"node 0 cannot listen on port {address[1]}: {str(error).splitlines()[0]}"
                raise UsageError(message, "choose another --master-port, the same on all nodes") from None
        self._deadline = time.monotonic() + MEET
        while not self._join(TCPStore):
            self._check_patience("node 0", "of this try did not come")
            time.sleep(10 * POLL)
        self._wait_for_all_to_join()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _join(self, store_class: type[TCPStore]) -> bool:
        """Whether the store is that of this try; one that knows this node already is left over from an earlier try."""
        self._reach()
        try:
            self._store = store_class(*self._address, is_master=False, timeout=timedelta(seconds=30))
            if self._store.add(self._joined(self._node), 1) == 1:
                return True
            self.warn()  # its node 0 may not know yet that this node was started again
        except RuntimeError:  # that node 0 has just gone
            pass
        return False

    def _joined(self, node: int) -> str:
        return f"fusion/joined/{node}"

    def _wait_for_all_to_join(self) -> None:
        try:
            while missing := [node for node in range(self._n) if not self._store.check([self._joined(node)])]:
                if self._store.check(["fusion/failing"]):
                    raise UnreachableError("a node was started again before all had met", "run the same command again")
                self._check_patience(f"node {missing[0]}", "did not come")
                time.sleep(4 * POLL)
        except StopRequested:
            with suppress(RuntimeError):
                self._store.delete_key(self._joined(self._node))  # it may come again
            raise
        except RuntimeError:
            raise UnreachableError("lost the connection to node 0", "see the log of node 0") from None

    def _reach(self) -> None:
        # Until node 0 has started its name may not resolve, and then nobody may listen there.
        while True:
            try:
                socket.create_connection(self._address, timeout=5).close()
                return
            except OSError as error:
                self._check_patience("node 0", f"did not answer at {self._address[0]}:{self._address[1]} ({error})")
                time.sleep(10 * POLL)

    def _check_patience(self, node: str, what: str) -> None:
        if self._stop.name:
            raise StopRequested(f"got {self._stop.name} while waiting for {node}", "run the same command again")
        if time.monotonic() > self._deadline:
            remedy = "start all nodes within that time, or correct --nnodes, --master-addr and --master-port"
            raise UnreachableError(f"{node} {what} within {MEET:.0f} s", remedy)

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
        if ending.failed or self._failing:  # then all others have been told, and all that still run have answered
            known += [_gone(node) for node in range(self._n) if node != self._node and node not in self._endings]
        self._leave()
        self._over = True
        self._listener.join(SETTLE)  # Python must not wind up under a thread that is inside of torch
        return min((other for other in known if other.failed), default=ending)

    def _listen(self) -> None:
        try:
            while len(self._endings) < self._n and not self._over:
                self._failing = self._failing or self._store.check(["fusion/failing"])
                for node in set(range(self._n)) - set(self._endings):
                    if self._store.check([key := f"fusion/ended/{node}"]):
                        self._endings[node] = Ending(**json.loads(self._store.get(key)))
                time.sleep(4 * POLL)
        except RuntimeError:
            if 0 not in self._endings:
                self._endings[0] = _gone(0)
                self._failing = True

    def _wait_for_nodes(self, ending: Ending, stop: Stop) -> None:
        start = time.monotonic()
        while len(self._endings) < self._n:
            on_request = self._grace if ending.code or stop.name else LEAVE
            if time.monotonic() > start + (2 * SETTLE if ending.failed or self._failing else on_request):
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


def _gone(node: int) -> Ending:
    # The ranks of other nodes then fail in ways of their own, which look like bugs.
    report = f"error: node {node} ended without a word\nhint: see whether it was killed or its machine was lost"
    return Ending(GONE, time.time(), 128 + signal.SIGKILL, report)
