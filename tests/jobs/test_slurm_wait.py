"""Waiting for a job while Slurm does not answer: `pytest tests/jobs/test_slurm_wait.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusion.errors import ConfigError, ExitCode, FusionError, UnreachableError
from fusion.jobs.schedulers import slurm_wait
from fusion.jobs.schedulers.slurm import _submission_error
from fusion.jobs.schedulers.slurm_settings import Cluster

ROW = 'case "$*" in *DerivedExitCode*) echo "{state}|0:0|0:0" ;; *) echo "7|{state}" ;; esac'


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_wait, "POLL", 0.01)
    monkeypatch.setattr(slurm_wait, "SETTLE", 0.01)


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_sacct_that_keeps_failing_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_wait, "RETRY_SECONDS", 0.1)
    program(tmp_path, "sacct", f"echo asked >> {tmp_path}/asked; echo 'Connection refused' >&2; exit 1")
    with pytest.raises(UnreachableError, match="sacct does not answer: Connection refused") as raised:
        slurm_wait.wait(["7"], Cluster(folder=str(tmp_path)))
    assert raised.value.code == ExitCode.UNREACHABLE
    assert raised.value.remedy == "the job goes on; see its state with sacct --jobs=7"
    assert (tmp_path / "asked").read_text().count("asked") > 1
    assert capsys.readouterr().out.count("retrying") == 1


def test_a_sacct_that_fails_once_is_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = ROW.format(state="COMPLETED")
    program(tmp_path, "sacct", f"[ -e {tmp_path}/failed ] || {{ touch {tmp_path}/failed; exit 1; }}\n{row}")
    assert slurm_wait.wait(["7"], Cluster(folder=str(tmp_path))) == ExitCode.DONE
    out = capsys.readouterr().out
    assert out.startswith("sacct does not answer: nothing; retrying for up to 300 s\n7 COMPLETED\n")


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL", "FAILED"])
def test_a_requeued_job_is_not_over(state: str, tmp_path: Path) -> None:
    """Also while squeue does not answer. sacct shows the state of the last try until the next one begins."""
    gone = f"{tmp_path}/gone"
    program(tmp_path, "squeue", f"[ -e {gone} ] || {{ touch {gone}; exit 1; }}\necho 7; echo 8")
    program(tmp_path, "sacct", f"[ -e {gone} ] && state=COMPLETED || state={state}\n{ROW.format(state='$state')}")
    assert slurm_wait.wait(["7"], Cluster(folder=str(tmp_path))) == ExitCode.DONE


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Slurm accounting storage is disabled", ConfigError),
        ("sacct: error: Sending PersistInit msg: Connection refused", UnreachableError),
    ],
)
def test_waiting_is_refused_without_accounting(said: str, kind: type[FusionError], tmp_path: Path) -> None:
    program(tmp_path, "sacct", f"echo '{said}' >&2; exit 1")
    with pytest.raises(kind, match=said):
        slurm_wait.check_accounting()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 69),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", 69),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", 69),
        ("sbatch: error: DNS SRV lookup failed\nsbatch: fatal: Could not establish a configuration source", 69),
        (
            "sbatch: error: Batch job submission failed: Slurm temporarily unable to accept job, sleeping and retrying",
            69,
        ),
        ("sbatch: error: invalid partition specified: nowhere", 78),
        ("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy", 78),
    ],
)
def test_errors_of_sbatch_have_exit_codes(said: str, code: int) -> None:
    assert _submission_error(said).code == code
