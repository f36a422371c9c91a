from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.environment import (
    LIBRARIES,
    RANKS,
    RENDEZVOUS,
    WAITING,
    RankVariables,
    cpu_quota,
    for_libraries,
    memory_limit,
    prepare_threads,
    rank,
    rank_variables,
    usable_cores,
    variable,
)
from fusion.errors import ConfigError, ExitCode

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for name in (*RANKS, *RENDEZVOUS):
        monkeypatch.delenv(name, raising=False)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_TEST_A", "")
    monkeypatch.setenv("FUSION_TEST_B", "b")
    assert variable("FUSION_TEST_A") is None
    assert variable("FUSION_TEST_A", "FUSION_TEST_B") == "b"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, RankVariables()),
        (MASTER, RankVariables()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, RankVariables()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **MASTER}, RankVariables()),
        ({"RANK": "3", "WORLD_SIZE": "4", **MASTER}, RankVariables(3, 4)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER},
            RankVariables(3, 4, 1, 2),
        ),
        ({"WORLD_SIZE": "4"}, RankVariables(ignored=("WORLD_SIZE",))),
        ({"WORLD_SIZE": "", "RANK": ""}, RankVariables()),
        ({"RANK": "3", **MASTER}, RankVariables(ignored=("RANK",))),
        ({"RANK": "3", "WORLD_SIZE": ""}, RankVariables(ignored=("RANK",))),
        ({"LOCAL_RANK": "1"}, RankVariables(ignored=("LOCAL_RANK",))),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, RankVariables(ignored=("WORLD_SIZE", "LOCAL_RANK"))),
    ],
    indirect=["given"],
)
@pytest.mark.usefixtures("given")
def test_variables_of_ranks_are_used_or_ignored_together(expected: RankVariables) -> None:
    assert rank_variables() == expected
    assert rank() == expected.rank


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4", **MASTER}, "RANK is 4, expected less than WORLD_SIZE, which is 4"),
        ({"RANK": "0", "WORLD_SIZE": "0", **MASTER}, "WORLD_SIZE is 0, expected at least 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **MASTER}, "RANK is '-1', expected a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2, expected less than LOCAL_WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "but MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": ""}, "but MASTER_PORT is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MASTER}, "but LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **MASTER}, "but LOCAL_RANK is not set"),
    ],
    indirect=["given"],
)
@pytest.mark.usefixtures("given")
def test_rejects_contradicting_variables(message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        rank_variables()
    assert message in raised.value.message
    assert rank() == 0


def test_variables_set_by_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*LIBRARIES, *WAITING}:
        monkeypatch.delenv(name, raising=False)
    assert for_libraries() == LIBRARIES
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert for_libraries() == {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert for_libraries() == {}


@pytest.mark.parametrize("launcher", [(), ("fusion.launch", "--nproc-per-node=1")])
@pytest.mark.parametrize(("own", "used"), [("", "2000"), ("5", "5")])
def test_commands_set_how_openmp_threads_wait(launcher: tuple[str, ...], own: str, used: str) -> None:
    command = ["-m", *launcher, "fusion.all_embeddings.train", "--data", "/nowhere"]
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment = {**clean, "GOMP_SPINCOUNT": own, "OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, env=environment)
    assert f"GOMP_SPINCOUNT = '{used}'" in done.stderr, done.stderr


@pytest.mark.parametrize("module", ["fusion.verify", "fusion.qwen_clip.train", "fusion.launch"])
def test_a_python_without_dependencies_gets_a_two_line_error(module: str) -> None:
    command = [sys.executable, "-S", "-m", module]  # -S: no installed packages
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=root)
    assert done.returncode == ExitCode.CONFIG
    assert done.stderr.splitlines() == [
        f"error: No module named 'fsspec' for {sys.executable}",
        "hint: run `. .venv/bin/activate` first; `make demo` makes .venv",
    ]


def limit(root: Path, path: str, content: str) -> Path:
    """Writes a file below a root folder, such as one of a cgroup; returns the root."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(content)
    return root


def test_memory_limits_of_both_versions_of_cgroups(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    second = limit(tmp_path / "2", "proc/self/cgroup", "0::/kubepods/pod1\n")
    limit(second, "sys/fs/cgroup/kubepods/pod1/memory.max", "max\n")
    assert memory_limit(second) is None
    limit(second, "sys/fs/cgroup/kubepods/memory.max", str(2**33))
    assert memory_limit(second) == 2**33
    first = limit(tmp_path / "1", "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory_limit(first) is None
    limit(first, "sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**32))
    assert memory_limit(first) == 2**32
    limit(first, "proc/self/cgroup", "4:memory:/jobs/1\n2:cpu:/\n")
    limit(first, "sys/fs/cgroup/memory/jobs/1/memory.limit_in_bytes", str(2**31))
    assert memory_limit(first) == 2**31


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("100000 100000", 1), ("9900000 100000", 99)])
def test_threads_are_no_more_than_the_quota_of_the_container(quota: str, cores: int, tmp_path: Path) -> None:
    machine = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == machine
    limit(tmp_path, "sys/fs/cgroup/cpu.max", f"{quota}\n")
    assert usable_cores(tmp_path) == min(cores, machine)
    limit(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert usable_cores(tmp_path) == machine


def test_cpu_quotas_of_both_versions_of_cgroups(tmp_path: Path) -> None:
    second = limit(tmp_path / "2", "proc/self/cgroup", "0::/kubepods/pod1\n")
    limit(second, "sys/fs/cgroup/kubepods/pod1/cpu.max", "max 100000\n")
    assert cpu_quota(second) is None
    limit(second, "sys/fs/cgroup/kubepods/cpu.max", "250000 100000\n")
    assert cpu_quota(second) == 2.5
    first = limit(tmp_path / "1", "proc/self/cgroup", "4:memory:/\n2:cpu,cpuacct:/jobs/1\n0::/\n")
    limit(first, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    limit(first, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(first) is None
    limit(first, "sys/fs/cgroup/cpu/jobs/1/cpu.cfs_quota_us", "150000\n")
    limit(first, "sys/fs/cgroup/cpu/jobs/1/cpu.cfs_period_us", "50000\n")
    assert cpu_quota(first) == 3


@pytest.mark.parametrize(
    "given", [{}, {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", **MASTER}], indirect=True
)
def test_ranks_divide_the_cores_unless_the_threads_are_set(given: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion.environment.usable_cores", lambda: 9)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    prepare_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    prepare_threads()
    assert os.environ["OMP_NUM_THREADS"] == ("2" if "RANK" in os.environ else "9")
