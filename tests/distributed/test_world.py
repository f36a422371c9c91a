from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist

from fusion.command.exit import recorded_by
from fusion.distributed import world as world_module
from fusion.distributed.world import World, _check_interface, alone, join_world
from fusion.errors import ConfigError, DataError, ExitCode, UnreachableError
from tests.forked import run_ranks
from tests.s3_server import _free_ports as free_ports


def test_no_time_limit_ends_ranks_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with join_world("cpu"):
        assert dist.group.WORLD is not None
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout > timedelta(days=100)


def test_a_process_alone_ignores_the_variables_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with alone("cpu") as world:
        assert (world.rank, world.size) == (0, 1) and world.on_main(lambda: 7) == 7
        with pytest.raises(ConfigError, match="in a process group of torch"), alone("cpu"):
            pass
    assert not dist.is_initialized()


def test_missing_ranks_are_not_reported_as_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (variables | {"MASTER_PORT": str(free_ports(1)[0])}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world_module, "ARRIVAL_TIMEOUT", 0.5)
    with (
        pytest.raises(UnreachableError, match=r"rank 0 did not reach all 2 ranks at 127.0.0.1:\d+ within"),
        join_world("cpu"),
    ):
        pass


def values_travel(world: World) -> None:
    frame = pd.DataFrame({"price": np.arange(3.0)}, index=["a", "b", "c"])
    answer = world.on_main(lambda: {"rows": np.arange(12).reshape(3, 4), "none": np.empty(0), "frame": frame})
    assert answer["rows"].tolist() == np.arange(12).reshape(3, 4).tolist() and answer["none"].size == 0
    assert answer["frame"].equals(frame)
    answer["rows"][0] = 7  # the received array belongs to this rank alone
    mine = {"rank": world.rank, "rows": np.full(world.rank * 1000, world.rank)}
    gathered = world.gather_on_main(mine)
    assert [value["rank"] for value in gathered] == (list(range(world.size)) if world.is_main else [])
    assert all((value["rows"] == value["rank"]).all() for value in gathered)
    assert world.exchange(world.rank) == list(range(world.size))
    assert world.together(lambda: world.rank) == world.rank


def errors_reach_all_ranks(world: World) -> None:
    def fail() -> None:
        raise DataError("no rows", "add some")

    for action in (world.on_main, world.together):
        with pytest.raises(DataError, match="no rows"):
            action(fail)
    with pytest.raises((ZeroDivisionError, RuntimeError), match="division"):
        world.together(lambda: 1 // world.rank)


def main_sends_each_array_once(world: World) -> None:
    """Rank 0 allocates next to nothing for the 64 MB that it sends, the others receive them once."""
    import tracemalloc

    size = 8 << 20
    value = np.ones(size) if world.is_main else None
    tracemalloc.start()
    received = world.on_main(lambda: value)
    gathered = world.gather_on_main(np.ones(size) if world.rank == 1 else np.empty(0))
    assert received is not None and received.nbytes == size * 8
    assert len(gathered) in (0, world.size)
    allocated = tracemalloc.get_traced_memory()[1]
    assert allocated < 1.1 * received.nbytes * (2 if world.rank == 1 else 1), allocated


def everything(world: World) -> None:
    for function in (values_travel, errors_reach_all_ranks, main_sends_each_array_once):
        function(world)


def test_ranks() -> None:
    done = run_ranks(3, everything)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("function", [values_travel, errors_reach_all_ranks])
def test_a_single_rank_gives_the_same_results(function: Callable[[World], None]) -> None:
    with join_world("cpu") as world:
        function(world)


def rank_2_stops(world: World) -> None:
    """As a node without power: its connections stay open, and it says nothing."""
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    with recorded_by((lambda error: print("recorded:", error, flush=True)) if world.is_main else None):
        world.together(lambda: None)


def main_is_killed(world: World) -> None:
    world.on_main(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_rank_without_heartbeats_is_named() -> None:
    started = time.monotonic()
    done = run_ranks(3, rank_2_stops, stall_timeout=2)
    assert done.returncode == ExitCode.STALLED
    assert "event=rank_silent silent=2" in done.stderr
    assert "error: rank 2 has sent no heartbeat for 2 s" in done.stderr
    assert "recorded: rank 2 has sent no heartbeat for 2 s" in done.stdout
    assert time.monotonic() - started < 60


def test_without_a_launcher_the_death_of_a_rank_is_noticed_at_once() -> None:
    started = time.monotonic()
    done = run_ranks(3, main_is_killed, stall_timeout=1000)
    assert done.returncode not in (0, ExitCode.STALLED)
    assert time.monotonic() - started < 60


def test_one_process_needs_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0-absent")
    with join_world("cpu") as world:
        assert world.sum([2.0]) == [2.0]


def test_an_interface_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib0-absent")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME is ib0-absent, but the network interfaces"):
        _check_interface()


def test_variables_that_leak_are_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert 'event=rank_variables_ignored ignored="WORLD_SIZE LOCAL_RANK"' in line
