"""How launchers of several nodes meet, and what they make of absent ones: `pytest tests/launch/test_rendezvous.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from fusion.errors import UnreachableError
from fusion.launch import rendezvous
from fusion.launch.processes import Stop
from fusion.launch.rendezvous import MultiNodeRendezvous, Rendezvous
from fusion.signals import SIGNALS
from tests.launch.test_launch import Launcher, Start, is_gone, start, wait_until
from tests.services import require

__all__ = ["start"]


def node(start: Start, number: int, port: int, worker: str, code: int = 0, n_nodes: int = 2) -> Launcher:
    flags = ("--nproc-per-node=1", f"--nnodes={n_nodes}", f"--node-rank={number}", f"--rdzv-endpoint=localhost:{port}")
    return start(*flags, worker=worker, code=code)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def stop() -> Iterator[Stop]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield Stop()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("vanishes", [0, 1])
def test_a_lost_node_is_not_reported_as_a_bug_of_the_others(start: Start, port: int, vanishes: int) -> None:
    nodes = [node(start, number, port, "reduce") for number in (0, 1)]
    nodes[0].pids(0, 1)
    nodes[vanishes].process.kill()
    code, err = nodes[1 - vanishes].end()
    assert code == 137, err
    assert err.endswith(
        f"error: node {vanishes} ended without a report\nhint: see whether it was killed or its machine was lost\n"
    )


def test_a_bug_of_one_node_stays_a_bug(start: Start, port: int) -> None:
    nodes = [node(start, number, port, "end", code=70) for number in (0, 1)]
    assert [launcher.end()[0] for launcher in nodes] == [70, 70]


def test_a_node_that_was_started_again_waits_for_a_new_try(start: Start, port: int) -> None:
    """Kubernetes replaces each pod separately, at its own pace."""
    old = [node(start, number, port, "deaf") for number in (0, 1)]
    (pid, _) = old[0].pids(0, 1)
    old[1].process.kill()
    for rank in (0, 1):
        (old[0].folder / f"{rank}.pid").unlink()
    new_1 = node(start, 1, port, "stop", code=75)
    assert old[0].end()[0] == 137  # the new node 1 makes it end; its own rank notices nothing
    assert is_gone(pid)
    assert new_1.process.poll() is None
    assert not (new_1.folder / "1.pid").exists()
    new_0 = node(start, 0, port, "stop", code=75)
    new_0.pids(0, 1)
    for launcher in (new_0, new_1):
        launcher.process.terminate()
    ended = [launcher.end() for launcher in (new_0, new_1)]
    assert [code for code, _ in ended] == [75, 75]
    assert not any("error:" in said for _, said in ended)  # torch may print warnings about the old node 0


def test_no_rank_starts_before_all_nodes_have_joined(start: Start, port: int) -> None:
    first, second = (node(start, number, port, "end", n_nodes=3) for number in (0, 1))
    wait_until(lambda: _listens(port))
    time.sleep(1)
    assert not (first.folder / "starts").exists()
    second.process.terminate()
    assert second.end() == (75, "error: got SIGTERM while waiting for node 2\nhint: run the same command again\n")
    others = [node(start, number, port, "end", n_nodes=3) for number in (1, 2)]  # a node may join again
    assert [launcher.end()[0] for launcher in (first, *others)] == [0, 0, 0]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def test_a_node_that_never_joins_is_named(port: int, stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", 1.0)
    with pytest.raises(UnreachableError, match="node 1 did not join within 1 s"):
        MultiNodeRendezvous(0, 2, ("localhost", port), 1.0, stop)


def test_a_node_0_that_never_starts_is_named(port: int, stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", 0.5)
    with pytest.raises(UnreachableError, match="node 0 did not answer at localhost"):
        MultiNodeRendezvous(1, 2, ("localhost", port), 1.0, stop)


def test_a_stop_ends_the_wait_for_other_nodes(start: Start, port: int) -> None:
    launcher = node(start, 0, port, "end")
    wait_until(lambda: _listens(port))
    os.kill(launcher.process.pid, signal.SIGTERM)
    assert launcher.end() == (75, "error: got SIGTERM while waiting for node 1\nhint: run the same command again\n")


WITHOUT_LOOPBACK = """
from fusion.errors import ConfigError
from fusion.launch.rendezvous import Rendezvous
try:
    Rendezvous()
except ConfigError as error:
    print(error.report())
"""


def test_a_machine_without_loopback_is_named_at_once() -> None:
    require(os.geteuid() == 0, "root, to make a network without interfaces")
    command = ["unshare", "-n", sys.executable, "-c", WITHOUT_LOOPBACK]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.startswith("error: neither 127.0.0.1 nor ::1 can be reached on this machine\nhint: ")


def test_no_name_needs_to_resolve() -> None:
    made = Rendezvous()
    assert made.environment()["MASTER_ADDR"] == "127.0.0.1"
    made._reserved.close()
    assert rendezvous._loopback() == "127.0.0.1"
