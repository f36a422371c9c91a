"""Provokes every exit code through `fusion.launch`, with one rank and with two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.conftest import SMALL, run_command, start_s3
from tests.s3_server import S3Server

LIMIT = 90.0  # seconds, on a busy machine
COMMANDS = ("train", "evaluate_by_groups", "predict_test")
ENDLESS = ["--epochs", "100000", "--patience", "100000", "--checkpoint-seconds", "0.2"]


class Job:
    """`python -m fusion.launch … fusion.all_embeddings.<command> …` with this many ranks."""

    started: ClassVar[list[Job]] = []

    def __init__(
        self, ranks: int, command: str, *flags: str, env: dict[str, str] | None = None, slow: bool = False
    ) -> None:
        line = [sys.executable, "-m", "fusion.launch", "--nproc-per-node", str(ranks)]
        line += ["--grace=5", "tests.slow_reading", command] if slow else [f"fusion.all_embeddings.{command}"]
        line += flags
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("FUSION_", "AWS_"))}
        environment = {**clean, "OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true", **(env or {})}
        self.process = subprocess.Popen(line, env=environment, text=True, stderr=subprocess.PIPE)
        self.started.append(self)

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=LIMIT)[1]
        return self.process.returncode, said

    def ranks(self) -> list[int]:
        """Process ids of the ranks that have been started, in their order."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    yield
    while Job.started:
        with Job.started.pop().process as process:  # closes its pipe
            process.kill()


@pytest.fixture(scope="module")
def run(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder with a finished run `r`."""
    output = tmp_path_factory.mktemp("codes")
    code, said = Job(1, "train", "--data", str(catalog), "--output", str(output), *SMALL, "--epochs", "1").end()
    assert code == 0, said
    return output


def flags_of(command: str, catalog: Path, output: Path | str) -> list[str]:
    flags = ["--data", str(catalog), "--output", str(output), "--device", "cpu"]
    return [*flags, *SMALL, "--epochs", "1"] if command == "train" else flags


ranks = pytest.mark.parametrize("ranks", [1, 2])
# The launcher treats the codes of all commands alike, so a single rank is only tested with `train`.
each = pytest.mark.parametrize(("command", "ranks"), [("train", 1), *((command, 2) for command in COMMANDS)])


@each
def test_0_done_and_nothing_to_do(command: str, ranks: int, catalog: Path, run: Path) -> None:
    n_times = 2 if command == "predict_test" else 1  # `run` is trained already
    assert [Job(ranks, command, *flags_of(command, catalog, run)).end()[0] for _ in range(n_times)] == [0] * n_times


BAD: dict[int, tuple[list[str], str]] = {
    64: (["--epoch", "1"], "unrecognized arguments: --epoch"),
    65: (["--data", "/nowhere"], "/nowhere"),
    78: (["--store-timeout", "-1"], "--store-timeout is '-1'"),
}


@each
@pytest.mark.parametrize("code", BAD)
def test_errors_that_a_user_can_fix(
    code: int, command: str, ranks: int, catalog: Path, run: Path, tmp_path: Path
) -> None:
    flags, message = BAD[code]
    output = tmp_path if command == "train" else run
    check(Job(ranks, command, *flags_of(command, catalog, output), *flags), code, message)


def check(job: Job, code: int, *messages: str) -> None:
    """The code, and two lines: once, not once a rank."""
    ended, said = job.end()
    assert ended == code, said
    assert said.count("\nerror: ") + said.startswith("error: ") == 1, said
    line = said.split("error: ")[1].splitlines()[0]
    assert any(message in line for message in messages) and "\nhint: " in said, said


@each
def test_69_a_store_that_does_not_answer(command: str, ranks: int, catalog: Path) -> None:
    env = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    job = Job(ranks, command, *flags_of(command, catalog, "s3://nowhere/out"), "--store-timeout", "1", env=env)
    check(job, 69, "does not answer")


@each
def test_77_credentials_that_are_wrong(command: str, ranks: int, catalog: Path, s3: S3Server) -> None:
    job = Job(
        ranks, command, *flags_of(command, catalog, "s3://fusion-tests/codes"), env=s3.environment(secret="wrong")
    )
    check(job, 77, "no access to s3://fusion-tests/codes")


@ranks
def test_70_a_loss_that_is_not_finite(ranks: int, catalog: Path, tmp_path: Path) -> None:
    flags = [*flags_of("train", catalog, tmp_path), "--lr", "1e30", "--loss", "mse", "--clip", "1e30", "--epochs", "9"]
    check(Job(ranks, "train", *flags), 70, "which is not finite at step")


@ranks
def test_75_a_training_that_is_asked_to_stop(ranks: int, catalog: Path, tmp_path: Path) -> None:
    job = Job(ranks, "train", *flags_of("train", catalog, tmp_path), *ENDLESS)
    wait_for_checkpoint(tmp_path, job)
    os.kill(job.ranks()[-1], signal.SIGTERM)  # to one of several ranks; all stop at the same step
    check(job, 75, "stopped on request at step")


@ranks
@pytest.mark.parametrize("command", COMMANDS[1:])
def test_75_an_early_stop_of_a_resumable_command(
    command: str, ranks: int, catalog: Path, run: Path, tmp_path: Path
) -> None:
    """The signal comes while the ranks still load torch: it is remembered."""
    folder = next((run / "runs").iterdir())
    job = Job(ranks, command, *flags_of(command, catalog, tmp_path), "--run-dir", str(folder))
    deadline = time.monotonic() + LIMIT
    while len(job.ranks()) < ranks or not all(map(listens, job.ranks())):
        assert time.monotonic() < deadline and job.process.poll() is None
        time.sleep(0.01)
    job.process.send_signal(signal.SIGTERM)
    check(job, 75, "stopped on request while the input was read")


@ranks
@pytest.mark.parametrize("command", COMMANDS)
def test_75_a_stop_while_the_input_is_read(command: str, ranks: int, catalog: Path, run: Path, tmp_path: Path) -> None:
    """Reading takes more than 20 s, and the ranks have 5."""
    where = [] if command == "train" else ["--run-dir", str(next((run / "runs").iterdir()))]
    job = Job(ranks, command, *flags_of(command, catalog, tmp_path), *where, slow=True)
    assert job.process.stderr is not None
    while "reading" not in job.process.stderr.readline():
        assert job.process.poll() is None
    os.kill(job.process.pid if ranks == 1 else job.ranks()[-1], signal.SIGTERM)  # of several, one is asked
    started = time.monotonic()
    check(job, 75, "stopped on request while the input was read; nothing was done yet")
    assert time.monotonic() - started < 10
    ends = [json.loads(path.read_text())["code"] for path in tmp_path.glob("runs/*/attempts/1/exit.json")]
    assert ends == ([75] if command == "train" else [])


def listens(pid: int) -> bool:
    """Whether the rank catches SIGTERM by now; until it runs its own command, it has the launcher's handlers."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    if b"fusion.launch" in command or b"fusion.all_embeddings" not in command:
        return False
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def wait_for_checkpoint(output: Path, job: Job) -> None:
    while not list(output.glob("runs/*/checkpoints/*/MANIFEST.json")):
        assert job.process.poll() is None, job.end()
        time.sleep(0.05)


def test_124_a_rank_that_makes_no_progress(catalog: Path, tmp_path: Path) -> None:
    job = Job(2, "train", *flags_of("train", catalog, tmp_path), *ENDLESS, "--stall-timeout", "8")
    wait_for_checkpoint(tmp_path, job)
    os.kill(job.ranks()[-1], signal.SIGSTOP)  # the other waits for it
    stalled, silent = " made no progress for 8 s", "rank 1 has sent no heartbeat for 8 s"
    check(job, 124, stalled, silent)  # the watchdog of rank 0 and its wait for heartbeats end in the same moment
    (folder,) = tmp_path.glob("runs/*/attempts/1")
    end = json.loads((folder / "exit.json").read_text())
    assert end["code"] == 124 and end["error"].endswith((stalled, silent)) and end["step"] > 0
    assert "event=stalled" in (folder / "log.txt").read_text()
    listed = run_command("fusion.jobs.pull", "runs", "--output", str(tmp_path)).out
    assert "failed (124)" in listed and any(message in listed for message in (stalled, silent))


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[S3Server]:
    server = start_s3(tmp_path)
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.stop()


def test_124_alone(catalog: Path, own_s3: S3Server) -> None:
    """The store hangs, and the next checkpoint is due: no step is taken until the one in flight is written."""
    flags = [*flags_of("train", catalog, "s3://fusion-tests/out"), *ENDLESS, "--stall-timeout", "8"]
    flags += ["--checkpoint-steps", "1"]
    job = Job(1, "train", *flags, env=own_s3.environment())
    assert job.process.stderr is not None
    while "event=committed" not in job.process.stderr.readline():
        assert job.process.poll() is None
    own_s3.process.send_signal(signal.SIGSTOP)
    check(job, 124, "rank 0 at step ")
