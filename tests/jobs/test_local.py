"""Stop signals to jobs on this machine: `pytest tests/jobs/test_local.py`. test_submit.py does it with real jobs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

import pytest

from fusion.errors import ExitCode
from fusion.jobs.schedulers import local
from fusion.jobs.schedulers.description import Job

TWO = [Job("all_embeddings", "train"), Job("qwen_clip", "train")]


def stands_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Replaces the launcher by a Python program."""
    monkeypatch.setattr(Job, "command", lambda _, python: [python, "-c", program])


def test_a_stop_signal_before_the_start_of_the_launcher_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in(monkeypatch, "import time; time.sleep(30)")
    start = subprocess.Popen

    def signalled(command: Sequence[str]) -> subprocess.Popen[bytes]:
        os.kill(os.getpid(), signal.SIGTERM)
        return start(command)

    monkeypatch.setattr(subprocess, "Popen", signalled)
    assert local.run(TWO) == ExitCode.STOPPED


def test_a_launcher_killed_by_a_stop_signal_before_it_has_a_handler_counts_as_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stands_in(monkeypatch, f"import os, time; os.kill({os.getpid()}, {int(signal.SIGUSR1)}); time.sleep(30)")
    assert local.run(TWO) == ExitCode.STOPPED


@pytest.mark.parametrize(
    ("program", "code"), [("raise SystemExit(65)", 65), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_other_exit_codes_are_kept(program: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in(monkeypatch, program)
    assert local.run(TWO) == code
