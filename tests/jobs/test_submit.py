"""What jobs/submit.py sends, and how it runs jobs on this machine: `pytest tests/jobs/test_submit.py`.

The expected output of `--dry-run` is in `golden/`. After an intended change, update it with
`python -m tests.jobs.test_submit`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from fusion.errors import ConfigError, UsageError
from fusion.jobs.schedulers import slurm_settings
from fusion.jobs.schedulers.description import Job, frozen
from fusion.jobs.schedulers.slurm_settings import Cluster
from fusion.jobs.submit import main
from tests.conftest import SMALL, Done
from tests.s3_server import S3Server

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden")
FLAGS = {
    "train": ["--gpus-per-node", "4", "--", "--precision", "bf16", "--hidden", "64", "32", "--drop-bad-prices"],
    "evaluate": ["--", "--by", "category", "it's odd"],
    "predict": ["--", "--name", "prices"],
}
CASES = {
    f"{cluster}-{task}": ["--cluster", cluster, "--task", task, *flags]
    for cluster in ("slurm", "k8s", "local")
    for task, flags in FLAGS.items()
} | {
    "slurm-variants-on-two-nodes": ["--cluster=slurm", "--variant", "all_embeddings", "qwen_clip", "--nodes=2"],
    "slurm-container-folds": [
        "--cluster=slurm", "--settings=slurm/container.toml", "--each-fold", "--max-requeues=3", "--", "--folds=3",
    ],
    "k8s-train-multinode": [
        "--cluster=k8s", "--variant=qwen_clip", "--nodes=4", "--gpus-per-node=8", "--image=registry.example.com/f:1",
    ],
}  # fmt: skip


def submit(*flags: str, env: dict[str, str] | None = None) -> Done:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FUSION_", "AWS_"))}
    environment = {**clean, "HOME": "/home/ada", "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, "jobs/submit.py", *flags]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


def here(*flags: str, env: dict[str, str] | None = None) -> Done:
    """The same as `submit`, in this process, for commands that start no job. Restores environment and folder."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FUSION_", "AWS_"))}
    out, err = StringIO(), StringIO()
    with (
        patch.dict(os.environ, {**clean, "HOME": "/home/ada", **(env or {})}, clear=True),
        chdir(ROOT),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = main(flags)
    return Done(code, out.getvalue(), err.getvalue())


def rendered(case: str) -> str:
    done = here("--dry-run", *CASES[case])
    assert (done.code, done.err) == (0, "")
    return done.out


@pytest.mark.parametrize("case", CASES)
def test_dry_run_shows_what_would_be_sent(case: str) -> None:
    assert rendered(case) == (GOLDEN / f"{case}.txt").read_text(), "update it with python -m tests.jobs.test_submit"


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        (["--gpus-per-node=4"], {}, True),
        ([], {}, True),
        (["--task=predict"], {}, False),
        (["--gpus-per-node=0"], {}, False),
        (["--gpus-per-node=4", "--", "--device=cpu"], {}, False),
        (["--gpus-per-node=4"], {"FUSION_DEVICE": "cpu"}, False),
    ],
)
def test_a_slurm_job_with_gpus_does_not_fall_back_to_the_cpu(
    flags: list[str], device: dict[str, str], expected: bool
) -> None:
    done = submit("--cluster=slurm", "--dry-run", *flags, env=device)
    assert done.code == 0, done.err
    assert ("export FUSION_DEVICE=cuda" in done.out) == expected


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("slurm")])
def test_scripts_are_bash(case: str) -> None:
    subprocess.run(["bash", "-n", str(GOLDEN / f"{case}.txt")], check=True)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--cluster=local -- --epoch 5", 64, "unrecognized arguments: --epoch 5\nhint: did you mean --epochs?"),
        ("--cluster=local -- --epochs 0", 78, "--epochs is '0': input should be greater than or equal to 1\nhint:"),
        ("--cluster=local -- --loss smaep", 78, "--loss is 'smaep': input should be 'weighted_smape', 'smape', "),
        ("--cluster=local --epochs 5", 64, "--epochs is not a flag of jobs/submit.py\nhint: put flags of the command"),
        ("--cluster=moon", 64, "argument --cluster: invalid choice: 'moon'"),
        ("", 64, "the following arguments are required: --cluster"),
        ("--cluster=slurm --task=sleep", 64, "--task is 'sleep', expected one of train, evaluate, predict\nhint:"),
        ("--cluster=k8s --variant=clip", 64, "--variant is 'clip', expected one of all_embeddings, qwen_clip\n"),
        ("--cluster=local --queue=gpu", 64, "--queue is for --cluster slurm or k8s, and --cluster is local\n"),
        ("--cluster=slurm --image=a:1", 64, "--image is for --cluster k8s, and --cluster is slurm\n"),
        ("--cluster=local --max-requeues=3", 64, "--max-requeues is for --cluster slurm, and --cluster is local\n"),
        ("--cluster=k8s --jobset", 64, "--jobset is for several nodes, and --nodes is 1\nhint: give both: --jobset"),
        ("--cluster=slurm --cpus-per-gpu=0", 64, "--cpus-per-gpu is 0, expected at least 1\nhint:"),
        ("--cluster=slurm --gpus-per-node=0 --memory-per-gpu=8", 64, "--memory-per-gpu is 8, and the job asks for no"),
        ("--cluster=k8s --memory-per-gpu=8Mi", 64, "argument --memory-per-gpu: expected a whole number of GiB"),
        ("--cluster=k8s --settings=no.toml", 78, "cannot read no.toml: No such file or directory\nhint:"),
        ("--cluster=slurm --nodes=0", 64, "--nodes is 0, expected at least 1\nhint: give --nodes 1 or more\n"),
        ("--cluster=slurm --gpus-per-node=-1", 64, "--gpus-per-node is -1, expected at least 0\nhint:"),
        ("--cluster=k8s --task=predict --nodes=2", 64, "--nodes is 2, and predict runs on one node\nhint:"),
        ("--cluster=local --nodes=2", 64, "--nodes is 2, and --cluster local is one node\nhint:"),
        ("--cluster=slurm --each-fold", 64, "--each-fold needs a training with --folds\nhint:"),
        ("--cluster=slurm --each-fold -- --folds 2 --run-id a", 64, "--run-id names one run, and these are 2\nhint:"),
        ("--cluster=slurm --if-changed", 64, "--if-changed is for predictions, and --task is train\nhint:"),
        ("--cluster=slurm --settings=no.toml", 78, "cannot read no.toml: No such file or directory\nhint:"),
        ("--cluster=slurm -- --config no.toml", 65, "no.toml does not exist"),
    ],
)  # fmt: skip
def test_user_errors_are_found_before_anything_is_sent(flags: str, code: int, said: str) -> None:
    done = here(*flags.split())
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"error: {said}"), done.err
    assert done.err.count("\n") == 2, done.err


@pytest.mark.parametrize("flags", ["--cluster=k8s --dry-run", "--cluster=slurm --nodes=0"])
def test_the_script_prints_the_same_as_main(flags: str) -> None:
    assert submit(*flags.split()) == here(*flags.split())


def test_settings_are_frozen_as_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("hidden = [8, 4]\nepochs = 7\ndrop_bad_prices = true\nseed = 3\n[sources]\nclip_image = 'mine'\n")
    monkeypatch.setenv("FUSION_SEED", "5")
    monkeypatch.setenv("FUSION_DATA", "s3://bucket/my data")
    job = frozen(Job("all_embeddings", "train", ("--config", str(file), "--epochs", "9", "--weight-decay", "0.0")))
    file.unlink()
    monkeypatch.delenv("FUSION_SEED")
    flags = "--data s3://bucket/my data|--drop-bad-prices|--epochs 9|--seed 5|--sources.clip-image mine"
    flags += "|--weight-decay 0.0"
    assert set(flags.split("|")) | {"--hidden 8 4"} == set(re.split(r" (?=--)", " ".join(job.flags)))
    assert frozen(job) == job


def settings(tmp_path: Path, text: str, task: str = "train") -> Cluster:
    path = tmp_path / "cluster.toml"
    path.write_text(f'folder = "logs"\n{text}')
    return slurm_settings.read(path, task)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partion = 'gpu'", "partion: Unexpected keyword argument"),
        ("time_minutes = 0", "time_minutes: Input should be greater than or equal to 1"),
        (
            "time_minutes = 3",
            "time_minutes = 3 leaves no time to work: the job is asked to stop signal_seconds = 120 before its end",
        ),
        ("signal_seconds = 30", "signal_seconds: Input should be greater than or equal to 90"),
        ("partition", "not TOML"),
        ("[environment]\nAWS_SECRET_ACCESS_KEY = 'x'", "environment holds AWS_SECRET_ACCESS_KEY"),
        ("[environment]\nAWS_ENDPOINT_URL_S3 = 'https://ada:hunter2@s3.test'", "environment holds AWS_ENDPOINT_URL_S3"),
        ("[train]\ncpus = 3", "cpus: Unexpected keyword argument"),
    ],
)
def test_invalid_settings_of_a_cluster_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, text)


def test_a_table_of_a_task_overrides_the_settings(tmp_path: Path) -> None:
    text = "partition = 'gpu'\ncpus_per_node = 8\n[predict]\npartition = 'cpu'"
    assert settings(tmp_path, text).partition == "gpu"
    assert settings(tmp_path, text, "predict").partition == "cpu"
    assert settings(tmp_path, text, "predict").cpus_per_node == 8


def test_the_job_reads_credentials_from_a_file_that_only_the_user_can_read(tmp_path: Path) -> None:
    keys = tmp_path / "my keys.env"
    cluster = settings(tmp_path, f"credentials = '{keys}'")
    with pytest.raises(ConfigError, match="no such file"):
        cluster.check_credentials()
    keys.write_text("AWS_SECRET_ACCESS_KEY=hunter2\n")
    keys.chmod(0o640)
    with pytest.raises(ConfigError, match="is open to other users"):
        cluster.check_credentials()
    keys.chmod(0o600)
    cluster.check_credentials()
    done = here(
        "--cluster=slurm", f"--settings={tmp_path}/cluster.toml", "--dry-run", env={"AWS_SECRET_KEY": "hunter2"}
    )
    assert done.code == 0
    (line,) = (one for one in done.out.splitlines() if one.startswith("eval "))
    assert shlex.split(line)[1] == f"set -a && . '{keys}' && set +a"
    assert "hunter2" not in done.out


def test_a_missing_program_of_a_cluster_is_named(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    for cluster, program, *further in (("slurm", "sbatch"), ("slurm", "sacct", "--wait"), ("k8s", "kubectl")):
        done = submit("--cluster", cluster, *further, env=nowhere)
        assert done.code == 69
        assert done.err.startswith(f"error: there is no {program} here\nhint: ")


def local(catalog: Path, output: Path, *flags: str) -> Sequence[str]:
    return [
        "--cluster=local",
        "--nproc-per-node=1",
        *flags,
        "--",
        "--data",
        str(catalog),
        "--output",
        str(output),
        *SMALL,
    ]


def test_local_runs_one_job_after_the_other(catalog: Path, tmp_path: Path) -> None:
    done = submit(*local(catalog, tmp_path, "--variant", "all_embeddings", "qwen_clip"), "--epochs", "1")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_if_changed_skips_the_prediction_while_nothing_has_changed(catalog: Path, tmp_path: Path) -> None:
    assert submit(*local(catalog, tmp_path), "--epochs", "1").code == 0
    flags = ["--cluster=local", "--task=predict", "--nproc-per-node=1", "--if-changed"]
    predict = [*flags, "--", "--output", str(tmp_path), "--device", "cpu", "--date", "2026-01-02"]
    assert submit(*predict).code == 0
    (made,) = tmp_path.glob("submissions/test/2026-01-02/*/submission.csv")
    again = submit(*predict)
    assert (again.code, again.out.splitlines()[-1]) == (0, f"nothing has changed: {made}")
    assert "event=read" not in again.out + again.err


def test_the_scrontab_sends_the_same_prediction_as_the_cronjob() -> None:
    (line,) = (one for one in (ROOT / "slurm" / "scrontab").read_text().splitlines() if not one.startswith("#"))
    done = here("--dry-run", *shlex.split(line.partition("jobs/submit.py")[2]))
    assert done.code == 0, done.err
    night = yaml.safe_load((ROOT / "k8s" / "predict-nightly.yaml").read_text())["spec"]["jobTemplate"]["spec"]
    _, *command = night["template"]["spec"]["containers"][0]["args"]
    assert " ".join(command[:3]) in done.out
    assert " ".join(command[3:]) in done.out


@pytest.mark.parametrize("text", ["", "AWS_ACCESS_KEY_ID=mine"])
def test_the_scrontab_reads_the_file_with_credentials_if_it_exists(text: str, tmp_path: Path) -> None:
    keys = tmp_path / ".config" / "fusion" / "credentials.env"
    if text:
        keys.parent.mkdir(parents=True)
        keys.write_text(text)
    *_, line = (ROOT / "slurm" / "scrontab").read_text().splitlines()
    before, program, _ = line.partition(".venv/bin/python")
    schedule, found, command = before.partition("cd /shared/fusion")
    assert (schedule, bool(found and program)) == ("30 3 * * * ", True)
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(["sh", "-c", f"true{command} env"], check=True, env=clean, capture_output=True, text=True)
    assert text in done.stdout


def test_local_ends_with_the_code_of_the_job(tmp_path: Path) -> None:
    done = submit(*local(tmp_path / "nothing", tmp_path))
    assert done.code == 65
    assert done.err.startswith("error: ")
    assert "nothing/train.csv" in done.err


@pytest.mark.parametrize(
    "flags", [["--task=predict", "--if-changed"], ["--task=predict", "--variant=ensemble"], ["--task=train"]]
)
def test_a_missing_bucket_is_named(flags: list[str], bucket: str, s3: S3Server) -> None:
    done = submit(
        *flags, "--cluster=local", "--", "--data=s3://no-such/data", "--output=s3://no-such/o", env=s3.environment()
    )
    assert done.code == 65
    assert done.err.startswith("error: there is no bucket no-such (s3://no-such/")
    assert done.err.endswith("\nhint: correct its name, or create it\n")


def test_a_local_job_stops_on_request(catalog: Path, tmp_path: Path) -> None:
    command = [sys.executable, "jobs/submit.py", *local(catalog, tmp_path), "--epochs=900", "--patience=900"]
    with subprocess.Popen([*command, "--checkpoint-steps=1"], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/checkpoints/*/MANIFEST.json")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75


def test_a_job_validates_its_fields() -> None:
    with pytest.raises(UsageError, match="--nproc-per-node is 0"):
        Job("qwen_clip", "train", nproc_per_node=0)


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"{case}.txt").write_text(rendered(case))
