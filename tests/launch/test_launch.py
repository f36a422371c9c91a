"""The launcher with real processes and real signals: `pytest tests/launch/test_launch.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusion.errors import ConfigError, UsageError
from fusion.launch.launcher import _parse

LIMIT = 120.0  # seconds for anything to happen on a busy machine: torch alone loads in 4
AT_ONCE = 30.0  # far below --grace and what the workers sleep
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PET_", "MASTER_", "JOB_"))}


class Launcher:
    """One launcher of `tests.worker`, and what became of it."""

    def __init__(self, *flags: str, worker: tuple[str, Path, int]) -> None:
        behaviour, self.folder, code = worker
        command = [
            sys.executable,
            "-m",
            "fusion.launch",
            *flags,
            "tests.worker",
            behaviour,
            str(self.folder),
            str(code),
        ]
        environment = {**CLEAN, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def end(self) -> tuple[int, str]:
        """Exit code, and all that was written to stderr."""
        _, self.err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, self.err

    def seconds_to_end(self) -> float:
        start = time.monotonic()
        self.end()
        return time.monotonic() - start

    def pids(self, *ranks: int) -> list[int]:
        """Process ids of these ranks, as soon as they are ready."""
        files = [self.folder / f"{rank}.pid" for rank in ranks]
        wait_until(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def signals(self, rank: int) -> list[str]:
        return (self.folder / f"{rank}.signals").read_text().split()


Start = Callable[..., Launcher]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts launchers; ends what a failed test has left of them."""
    launchers: list[Launcher] = []

    def launch(*flags: str, worker: str, code: int = 0) -> Launcher:
        launchers.append(Launcher(*flags, worker=(worker, tmp_path, code)))
        return launchers[-1]

    yield launch
    for launcher in launchers:
        with launcher.process as process:  # closes the pipes, which ranks may still hold
            process.kill()


def wait_until(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("code", [0, 3, 65, 70, 75, 124])
def test_keeps_the_exit_code_of_one_rank(start: Start, code: int) -> None:
    assert start("--nproc-per-node=1", worker="end", code=code).end()[0] == code


@pytest.mark.parametrize(("code", "kept"), [(65, 65), (75, 75), (-signal.SIGKILL, 137), (-signal.SIGSEGV, 139)])
def test_keeps_the_exit_code_of_one_rank_among_several(start: Start, code: int, kept: int) -> None:
    assert start("--nproc-per-node=3", worker="end", code=code).end()[0] == kept


def test_says_which_rank_died_of_which_signal(start: Start) -> None:
    _, err = start("--nproc-per-node=2", worker="end", code=-signal.SIGKILL).end()
    assert err == "error: rank 1 was killed by SIGKILL\nhint: give it more memory if that ran out\n"


def test_a_traceback_is_a_bug(start: Start) -> None:
    code, err = start("--nproc-per-node=1", worker="bug").end()
    assert code == 70
    assert err.count("RuntimeError: no reason") == 1


def test_prints_the_report_of_the_cause_once(start: Start) -> None:
    assert start("--nproc-per-node=4", worker="report", code=65).end() == (
        65,
        "error: train.csv is empty\nhint: fill it\n",
    )


def test_everything_after_the_module_is_the_commands(start: Start) -> None:
    command = [sys.executable, "-m", "fusion.launch", "--nproc-per-node=1", "tests.worker", "arguments", "."]
    flags = ["0", "--help", "--grace", "x", "--", "--nnodes=0"]
    done = subprocess.run([*command, *flags], env=CLEAN, check=True, capture_output=True, text=True)
    assert done.stderr == '["arguments", ".", "0", "--help", "--grace", "x", "--", "--nnodes=0"]\n'
    assert done.stdout == "a line without its end"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_signal_reaches_every_rank_once(start: Start, number: signal.Signals) -> None:
    launcher = start("--nproc-per-node=2", worker="stop", code=75)
    launcher.pids(0, 1)
    launcher.process.send_signal(number)
    time.sleep(0.1)
    launcher.process.send_signal(number)
    assert launcher.end() == (75, "")
    assert [launcher.signals(rank) for rank in (0, 1)] == [["SIGTERM"], ["SIGTERM"]]


def test_a_stop_of_ranks_in_collectives(start: Start) -> None:
    launcher = start("--nproc-per-node=2", worker="reduce", code=75)
    launcher.pids(0, 1)
    launcher.process.terminate()
    assert launcher.seconds_to_end() < 10
    assert (launcher.process.returncode, launcher.err) == (75, "")
    assert [launcher.signals(rank) for rank in (0, 1)] == [["SIGTERM"], ["SIGTERM"]]


def test_a_stop_with_nothing_left_to_do_is_success(start: Start) -> None:
    launcher = start("--nproc-per-node=2", worker="stop", code=0)
    launcher.pids(0, 1)
    launcher.process.terminate()
    assert launcher.end() == (0, "")


def test_a_rank_that_ignores_the_stop_is_killed_after_the_grace_period(start: Start) -> None:
    launcher = start("--nproc-per-node=2", "--grace=1", worker="deaf")
    pids = launcher.pids(0, 1)
    began = time.monotonic()
    launcher.process.terminate()
    launcher.end()
    assert 1 < time.monotonic() - began < AT_ONCE
    assert launcher.process.returncode == 137
    assert launcher.err.startswith("error: rank 0 had not ended 1 s after it was asked to stop, and was killed\nhint:")
    assert all(map(is_gone, pids))


def test_ranks_that_leave_on_their_own_do_not_wait_for_one_that_hangs(start: Start) -> None:
    launcher = start("--nproc-per-node=2", "--grace=1", worker="hang", code=75)
    launcher.pids(0)
    assert launcher.seconds_to_end() < AT_ONCE
    assert launcher.process.returncode == 137


def test_no_rank_outlives_a_killed_launcher(start: Start) -> None:
    launcher = start("--nproc-per-node=2", worker="deaf")
    pids = launcher.pids(0, 1)
    launcher.process.kill()
    wait_until(lambda: all(map(is_gone, pids)), limit=AT_ONCE)


def test_if_a_rank_dies_hanging_ranks_are_killed(start: Start) -> None:
    launcher = start("--nproc-per-node=2", worker="hang", code=-signal.SIGKILL)
    (pid,) = launcher.pids(0)
    assert launcher.seconds_to_end() < 10
    assert launcher.process.returncode == 137
    assert launcher.err.startswith("error: rank 1 was killed by SIGKILL\n")
    assert is_gone(pid)
    assert not (launcher.folder / "0.signals").exists()  # a stop signal would make it save a checkpoint in vain


def test_a_rank_killed_amid_collectives_is_the_cause(start: Start) -> None:
    launcher = start("--nproc-per-node=2", worker="reduce", code=75)
    os.kill(launcher.pids(0, 1)[1], signal.SIGKILL)
    assert launcher.seconds_to_end() < 10
    assert launcher.process.returncode == 137
    assert launcher.err.endswith("error: rank 1 was killed by SIGKILL\nhint: give it more memory if that ran out\n")


def test_a_second_attempt_can_succeed(start: Start) -> None:
    launcher = start("--nproc-per-node=2", "--max-restarts=1", worker="reduce_at_second_try", code=137)
    out, err = launcher.process.communicate(timeout=LIMIT)
    assert launcher.process.returncode == 0
    assert out.count("attempt 1 sum 2") == 2
    assert "restart 1 of 1: starting all ranks again" in err


@pytest.mark.parametrize(("code", "n_starts"), [(64, 1), (65, 1), (75, 1), (77, 1), (78, 1), (69, 3)])
def test_restarts_only_what_may_succeed(start: Start, code: int, n_starts: int) -> None:
    launcher = start("--nproc-per-node=1", "--max-restarts=2", worker="end", code=code)
    assert launcher.end()[0] == code
    assert len((launcher.folder / "starts").read_text().split()) == n_starts


def two_nodes(start: Start, worker: str, code: int) -> tuple[Launcher, Launcher]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    flags = ("--nproc-per-node=1", "--nnodes=2", f"--rdzv-endpoint=localhost:{port}")
    node_1 = start(*flags, "--node-rank=1", worker=worker, code=code)
    return start(*flags, "--node-rank=0", worker=worker, code=code), node_1


def test_two_nodes_stop_together_when_one_is_asked(start: Start) -> None:
    nodes = two_nodes(start, "reduce", code=75)
    nodes[0].pids(0, 1)
    nodes[1].process.terminate()
    assert [node.end()[0] for node in nodes] == [75, 75]


def test_if_a_rank_dies_the_other_node_ends_too(start: Start) -> None:
    nodes = two_nodes(start, "hang", code=-signal.SIGKILL)
    nodes[0].pids(0, 1)
    assert max(node.seconds_to_end() for node in nodes) < 10
    assert [node.process.returncode for node in nodes] == [137, 137]
    assert all(node.err.count("error: rank 1 was killed by SIGKILL\n") == 1 for node in nodes)


def test_a_stop_while_the_launcher_counts_gpus(start: Start) -> None:
    launcher = start("--nproc-per-node=auto", worker="end")
    wait_until(lambda: b"libtorch" in Path(f"/proc/{launcher.process.pid}/maps").read_bytes())
    launcher.process.terminate()
    assert launcher.end() == (
        75,
        "error: asked to stop (SIGTERM) before any rank was started\nhint: run the same command again\n",
    )
    assert not (launcher.folder / "starts").exists()


def test_a_stop_while_node_0_is_not_there(start: Start) -> None:
    flags = ("--nnodes=2", "--node-rank=1", "--master-addr=node-0.invalid", "--nproc-per-node=1")
    launcher = start(*flags, worker="end")
    wait_until(lambda: b"libtorch" in Path(f"/proc/{launcher.process.pid}/maps").read_bytes())
    launcher.process.terminate()
    assert launcher.end() == (75, "error: got SIGTERM while waiting for node 0\nhint: run the same command again\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nproc-per-node=0", "fusion.launch"], "--nproc-per-node: is 0, expected at least 1"),
        (["--nnodes=1:2", "fusion.launch"], "--nnodes: invalid number value: '1:2'"),
        (["--nproc=2", "fusion.launch"], "unrecognized arguments: --nproc=2"),
        ([], "the following arguments are required"),
        (["fusion.absent"], "there is no module 'fusion.absent'"),
        (["absent.too"], "there is no module 'absent.too'"),
        (["--grace=-1", "fusion.launch"], "--grace: is -1, expected 0 or more"),
        (["--nnodes=2", "fusion.launch"], "--node-rank is None"),
        (["--nnodes=2", "--node-rank=2", "fusion.launch"], "--node-rank is 2"),
        (["--nnodes=2", "--node-rank=0", "fusion.launch"], "node 0 is ?:29500"),
        (["--nnodes=2", "--node-rank=0", "--rdzv-endpoint=a:b", "fusion.launch"], "node 0 is a:0"),
        (["--nnodes=2", "--node-rank=0", "--master-addr=a", "--max-restarts=1", "fusion.launch"], "expected 0"),
    ],
)
def test_usage_errors(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(CLEAN):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "1")
    with pytest.raises(UsageError) as raised:
        _parse(flags)
    assert message in raised.value.message


def test_a_variant_may_be_named_as_in_a_subcommand() -> None:
    options = _parse(["--nproc-per-node", "1", "train", "qwen_clip", "--epochs", "3"])
    assert options.command[1:] == ("-m", "fusion.qwen_clip.train", "--epochs", "3")


def test_a_usage_error_is_two_lines_and_64() -> None:
    done = subprocess.run([sys.executable, "-m", "fusion.launch", "--x"], check=False, capture_output=True, text=True)
    assert done.returncode == 64
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize(
    "environment",
    [
        {"PET_NNODES": "4", "PET_NODE_RANK": "2", "MASTER_ADDR": "gpu1", "PET_MASTER_PORT": "29500"},
        {"PET_NNODES": "4", "JOB_COMPLETION_INDEX": "2", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"},
        {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "gpu[1-4]"},
    ],
)
def test_nodes_from_kubernetes_and_slurm(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(CLEAN):
        monkeypatch.delenv(name)
    for name, value in {**environment, "PET_NPROC_PER_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    options = _parse(["fusion.launch"])
    assert (options.nnodes, options.node_rank, options.nproc_per_node) == (4, 2, 8)
    assert (options.master_addr, options.master_port) == ("gpu1", 29500)


def test_help_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fusion.launch", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "--nproc-per-node" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fusion.launch.processes" in imported and not {"torch", "numpy", "pandas", "fsspec"} & imported


def test_a_stop_request_before_a_rank_handles_signals(start: Start) -> None:
    launcher = start("--nproc-per-node=2", worker="unready", code=75)
    launcher.pids(0, 1)
    launcher.process.terminate()
    report = "error: rank 1 was asked to stop before it had begun\nhint: run the same command again\n"
    assert launcher.end() == (75, report)


def test_slurm_signals_the_ranks_too(start: Start) -> None:
    launcher = start("--nproc-per-node=2", worker="unready", code=75)
    for pid in (launcher.process.pid, *launcher.pids(0, 1)):
        os.kill(pid, signal.SIGUSR2)
    assert launcher.end()[0] == 75


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PET_NNODES": "1:2"}, "PET_NNODES is '1:2', expected one number"),
        ({"PET_NNODES": "0"}, "PET_NNODES is 0, expected at least 1"),
        ({"PET_NNODES": "", "SLURM_STEP_NUM_NODES": "two"}, "SLURM_STEP_NUM_NODES is 'two', expected one number"),
        ({"PET_NNODES": "2", "JOB_COMPLETION_INDEX": "-1"}, "JOB_COMPLETION_INDEX is -1, expected at least 0"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT is 'tcp://10.0.0.1:80', expected one number"),
        ({"PET_NPROC_PER_NODE": "all"}, "PET_NPROC_PER_NODE is 'all', expected one number"),
    ],
)
def test_a_variable_that_is_wrong_is_named(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in set(os.environ) - set(CLEAN):
        monkeypatch.delenv(name)
    for name, value in {"PET_NPROC_PER_NODE": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        _parse(["fusion.launch"])
    assert raised.value.message == message


def test_a_remedy_suggests_no_flag_that_was_given() -> None:
    with pytest.raises(UsageError) as raised:
        _parse(["--nnodes=1:2", "fusion.launch"])
    assert "did you mean" not in raised.value.remedy
