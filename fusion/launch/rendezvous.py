"""The rendezvous: how the ranks of a run find each other, and how the launchers of several nodes exchange failures."""

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
from fusion.launch.processes import POLL, SETTLE, Ending, FailureKind, Stop

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

JOIN_TIMEOUT = 600.0  # seconds that the launchers wait for each other; nodes pull images at different speeds
END_TIMEOUT = 300.0  # seconds that a node whose ranks are done waits for the other nodes, as torch's agents do


def _reserve() -> socket.socket:
    """A socket bound to a free port of the loopback interface. It uses addresses, so that no name has to resolve.

    Raises:
        ConfigError: the loopback interface is down; without this check, ranks would try to connect for minutes.
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
    # Nothing listens on the port yet, so connecting must be refused. If the interface is down, it fails otherwise.
    with socket.socket(reserved.family) as probe:
        probe.settimeout(5)  # seconds; the loopback interface answers within milliseconds, also on a busy machine
        return probe.connect_ex(reserved.getsockname()) in (0, errno.ECONNREFUSED)


def _loopback() -> str:
    with _reserve() as reserved:
        return str(reserved.getsockname()[0])


class Rendezvous:
    """How the ranks of a single node find each other: at a port that stays reserved, also across restarts."""

    def __init__(self) -> None:
        # The socket is bound but does not listen. So the kernel gives the port to no other process, but rank 0 can
        # still listen on it.
        self._reserved = _reserve()

    def environment(self) -> dict[str, str]:
        address, port = self._reserved.getsockname()[:2]
        return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}

    def warn(self) -> None:
        """Tells the other nodes that a rank of this node has failed."""

    def is_failing(self) -> bool:
        """Whether a rank of another node has failed."""
        return False

    def conclude(self, ending: Ending, stop: Stop) -> Ending:
        """How all nodes together ended, given how this one did."""
        return ending


class MultiNodeRendezvous(Rendezvous):
    """A TCPStore on node 0, through which the ranks of all nodes find each other and launchers exchange endings."""

    def __init__(self, node: int, n_nodes: int, address: tuple[str, int], grace: float, stop: Stop) -> None:
        from torch._C._distributed_c10d import TCPStore  # takes seconds to load; a single node does not need it

        self._node, self._n, self._address, self._grace, self._stop = node, n_nodes, address, grace, stop
        self._endings: dict[int, Ending] = {}
        self._over = self._failing = False
        if self._node == 0:
            try:
                self._server = TCPStore(_loopback(), address[1], is_master=True, wait_for_workers=False)
            except RuntimeError as error:
                message = f"node 0 cannot listen on port {address[1]}: {str(error).splitlines()[0]}"
                raise UsageError(message, "choose another --master-port, the same on all nodes") from None
        self._deadline = time.monotonic() + JOIN_TIMEOUT
        while not self._join(TCPStore):
            self._check_patience("node 0", "of this try did not start")
            time.sleep(10 * POLL)
        self._wait_for_all_to_join()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _join(self, store_class: type[TCPStore]) -> bool:
        """Connects to the store of node 0, and returns whether it belongs to this try.

        A store that this node has joined before is left over from an earlier try of the job.
        """
        self._reach()
        try:
            self._store = store_class(*self._address, is_master=False, timeout=timedelta(seconds=30))
            if self._store.add(self._joined(self._node), 1) == 1:
                return True
            self.warn()  # so that node 0 of the earlier try learns that this node was restarted, and ends
        except RuntimeError:  # node 0 of the earlier try has just ended
            pass
        return False

    def _joined(self, node: int) -> str:
        return f"fusion/joined/{node}"

    def _wait_for_all_to_join(self) -> None:
        try:
            while missing := [node for node in range(self._n) if not self._store.check([self._joined(node)])]:
                if self._store.check(["fusion/failing"]):
                    raise UnreachableError("a node was restarted before all had joined", "run the same command again")
                self._check_patience(f"node {missing[0]}", "did not join")
                time.sleep(4 * POLL)
        except StopRequested:
            with suppress(RuntimeError):
                self._store.delete_key(self._joined(self._node))  # so that this node can join again
            raise
        except RuntimeError:
            raise UnreachableError("lost the connection to node 0", "see the log of node 0") from None

    def _reach(self) -> None:
        """Waits until something listens at the address of node 0. Until node 0 runs, its name may not even resolve."""
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
            raise UnreachableError(f"{node} {what} within {JOIN_TIMEOUT:.0f} s", remedy)

    def environment(self) -> dict[str, str]:
        address, port = self._address
        return {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def warn(self) -> None:
        with suppress(RuntimeError):  # raised if node 0, and with it the store, is gone
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
        if ending.failed or self._failing:  # all nodes know of the failure, and those that still run have reported
            known += [_lost(node) for node in range(self._n) if node != self._node and node not in self._endings]
        self._leave()
        self._over = True
        self._listener.join(SETTLE)  # the interpreter must not shut down while a thread is inside torch
        return min((other for other in known if other.failed), default=ending)

    def _listen(self) -> None:
        """Reads failures and endings of other nodes from the store; runs in a thread of its own."""
        try:
            while len(self._endings) < self._n and not self._over:
                self._failing = self._failing or self._store.check(["fusion/failing"])
                for node in set(range(self._n)) - set(self._endings):
                    if self._store.check([key := f"fusion/ended/{node}"]):
                        self._endings[node] = Ending(**json.loads(self._store.get(key)))
                time.sleep(4 * POLL)
        except RuntimeError:  # the store is gone, and with it node 0
            if 0 not in self._endings:
                self._endings[0] = _lost(0)
                self._failing = True

    def _wait_for_nodes(self, ending: Ending, stop: Stop) -> None:
        start = time.monotonic()
        while len(self._endings) < self._n:
            if ending.failed or self._failing:
                # The other nodes first notice the failure, and then give their ranks SETTLE seconds.
                timeout = 2 * SETTLE
            elif ending.code or stop.name:
                timeout = self._grace
            else:
                timeout = END_TIMEOUT
            if time.monotonic() > start + timeout:
                return
            time.sleep(POLL)

    def _leave(self) -> None:
        """Waits on node 0 until the other nodes have left, because the store ends with it."""
        with suppress(RuntimeError):
            n_left = self._store.add("fusion/left", 1)
            deadline = time.monotonic() + SETTLE
            while self._node == 0 and n_left < self._n and time.monotonic() < deadline:
                time.sleep(POLL)
                n_left = self._store.add("fusion/left", 0)


def _lost(node: int) -> Ending:
    """The ending of a node that reported none. It ranks before errors of other nodes that look like bugs.

    These are probably its consequence.
    """
    report = f"error: node {node} ended without a report\nhint: see whether it was killed or its machine was lost"
    return Ending(FailureKind.LOST_NODE, time.time(), 128 + signal.SIGKILL, report)
