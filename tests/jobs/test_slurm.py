"""jobs/submit.py on a real Slurm of two nodes, and a real S3 server: `pytest tests/jobs/test_slurm.py`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusion import storage
from fusion.demo.catalog import generate
from tests.conftest import DIMS, SMALL, Done, upload
from tests.s3_server import WRITER_KEY, WRITER_SECRET
from tests.services import require
from tests.slurm_cluster import SlurmCluster, install

ROOT = Path(__file__).parents[2]
LIMIT = 400.0  # seconds that any condition may take, on a busy machine
TRAINING = [*SMALL, "--checkpoint-steps", "10", "--patience", "1000"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    require(install(), "Slurm (root, and Debian's slurm-wlm, slurmdbd, munge and mariadb-server)")
    running = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def small_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog")
    generate(folder, n_products=300, dims=DIMS)
    return folder


class Submit:
    """Runs `jobs/submit.py --cluster slurm` with the settings of the test's cluster."""

    def __init__(self, cluster: SlurmCluster, folder: Path, environment: dict[str, str]) -> None:
        self.cluster, self.folder = cluster, folder
        self.started: list[subprocess.Popen[str]] = []
        keys = folder / "credentials.env"
        keys.write_text(f"AWS_ACCESS_KEY_ID={WRITER_KEY}\nAWS_SECRET_ACCESS_KEY={WRITER_SECRET}\n")
        keys.chmod(0o600)
        self.settings = folder / "cluster.toml"
        values = {"folder": str(folder / "logs"), "python": sys.executable, "credentials": str(keys)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        lines += ["cpus_per_node = 1", "time_minutes = 10", "[environment]"]
        environment = {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.settings.write_text("\n".join([*lines, *(f"{k} = {json.dumps(v)}" for k, v in environment.items())]))

    def __call__(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "jobs/submit.py", "--cluster=slurm", f"--settings={self.settings}", *flags]
        options = ["--gpus-per-node=0", "--nproc-per-node=1"]
        at = command.index("--") if "--" in command else len(command)
        command[at:at] = options
        clean = {k: v for k, v in self.cluster.environment.items() if not k.startswith(("AWS_", "FUSION_"))}
        environment = {**clean, "PYTHONPATH": str(ROOT)}
        self.started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        return self.started[-1]

    def log(self, job_id: str, node: int = 0) -> str:
        return (self.folder / "logs" / f"{job_id}_{node}_log.out").read_text()

    def restarts(self, job_id: str) -> int:
        shown = self.cluster.run("scontrol", "show", "job", job_id)
        found = re.search(r"Restarts=(\d+)", shown)
        assert found
        return int(found[1])


@pytest.fixture
def submit(cluster: SlurmCluster, bucket: str, s3: Any, tmp_path: Path) -> Iterator[Submit]:
    environment = {key: value for key, value in s3.environment().items() if "ACCESS_KEY" not in key}
    submit = Submit(cluster, tmp_path, environment)
    yield submit
    for process in submit.started:
        with process:
            process.kill()
    cluster.run("scancel", "--user=root")


def ended(process: subprocess.Popen[str]) -> Done:
    out, _ = process.communicate(timeout=LIMIT)
    return Done(process.returncode, out, "")


def job_id(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    found = re.match(r"submitted (\d+)", line)
    assert found, line + process.stdout.read()
    return found[1]


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {LIMIT:g} s"
        time.sleep(0.3)


def checkpoints(run: str) -> list[str]:
    return [url for url in storage.ls(f"{run}/checkpoints") if storage.exists(f"{url}/MANIFEST.json")]


def codes(run: str) -> list[int]:
    urls = sorted(storage.ls(f"{run}/attempts"))
    return [json.loads(storage.read(f"{url}/exit.json"))["code"] for url in urls]


def newest_model(run: str) -> str:
    return hashlib.sha256(storage.read(f"{sorted(checkpoints(run))[-1]}/model.safetensors")).hexdigest()


def test_a_training_that_is_stopped_and_preempted_ends_with_the_same_bytes(
    cluster: SlurmCluster, submit: Submit, bucket: str, small_catalog: Path
) -> None:
    upload(small_catalog, f"{bucket}/data")
    flags = ["--", "--data", f"{bucket}/data", "--output", f"{bucket}/out", *TRAINING, "--epochs", "120"]
    process = submit("--nodes=2", "--wait", *flags, "--run-id", "interrupted")
    number, run = job_id(process), f"{bucket}/out/runs/interrupted"
    command = [sys.executable, "jobs/submit.py", "--cluster=local", "--nproc-per-node=2", *flags, "--run-id", "whole"]
    whole = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True
    )
    submit.started.append(whole)

    wait_for(lambda: checkpoints(run), "a checkpoint")
    cluster.run("scancel", "--signal=USR2", number)
    wait_for(lambda: storage.exists(f"{run}/attempts/2/start.json"), "the second attempt")
    before = checkpoints(run)
    wait_for(lambda: checkpoints(run) != before, "another checkpoint")
    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1")

    done = ended(process)
    assert done.code == 0, done.out + submit.log(number)
    assert codes(run) == [75, 75, 0]
    assert submit.restarts(number) == 2
    assert "COMPLETED" in cluster.run("sacct", "--noheader", "--allocations", f"--jobs={urgent}", "--format=State")
    assert submit.log(number).count("stopped on request, requeued") == 2
    assert submit.log(number).count("event=resumed") == 2

    assert whole.wait(LIMIT) == 0
    assert newest_model(run) == newest_model(f"{bucket}/out/runs/whole")


def test_failures_keep_their_code_and_are_not_requeued(submit: Submit, bucket: str, small_catalog: Path) -> None:
    upload(small_catalog, f"{bucket}/data")
    settings = submit.settings.read_text()
    flags = ["--wait", "--", "--data", f"{bucket}/data", "--output", f"{bucket}/out", *TRAINING, "--epochs", "30"]
    unreachable = re.sub("AWS_ENDPOINT_URL_S3.*", 'AWS_ENDPOINT_URL_S3 = "http://127.0.0.1:9"', settings)
    jobs = []
    for text, further, code, message, tries in (
        (unreachable, ["--store-timeout", "0"], 69, "error: .*\nhint: ", ["1", "2"]),
        (settings, ["--data", f"{bucket}/nothing"], 65, "error: .*nothing/train.csv.*\nhint: ", []),
        (settings, ["--lr", "1e30", "--clip", "1e30"], 70, "error: .*not finite.*\nhint: ", []),
        (settings.replace(sys.executable, "/nowhere/python"), [], 2, "FAILED", []),
    ):
        submit.settings.write_text(text)
        process = submit(*flags, *further)
        jobs.append((process, job_id(process), code, message, tries))
    for process, number, code, message, tries in jobs:
        done = ended(process)
        assert done.code == code, done.out + submit.log(number)
        assert re.search(message, done.out), done.out
        assert f"FAILED with exit code {code}, log: {submit.folder}/logs/{number}_0_log.out" in done.out
        assert re.findall(rf"try (\d) of 3 ended with {code}: next try", submit.log(number)) == tries
        assert submit.restarts(number) == 0


def test_a_cancelled_training_commits_and_stays_cancelled(submit: Submit, bucket: str, small_catalog: Path) -> None:
    upload(small_catalog, f"{bucket}/data")
    flags = ["--data", f"{bucket}/data", "--output", f"{bucket}/out", *TRAINING, "--epochs", "500"]
    process = submit("--wait", "--", *flags, "--run-id", "cancelled")
    number, run = job_id(process), f"{bucket}/out/runs/cancelled"
    wait_for(lambda: checkpoints(run), "a checkpoint")
    submit.cluster.run("scancel", number)
    done = ended(process)
    assert "CANCELLED" in done.out
    assert done.code == 143, done.out
    wait_for(lambda: storage.exists(f"{run}/attempts/1/exit.json"), "the end")
    assert codes(run) == [75]
    assert submit.restarts(number) == 0
    assert submit.cluster.run("squeue", "--noheader", f"--jobs={number}", "--states=PENDING,RUNNING") == ""


def test_an_array_of_variants_requeues_the_task_that_was_stopped(
    cluster: SlurmCluster, submit: Submit, bucket: str, small_catalog: Path
) -> None:
    upload(small_catalog, f"{bucket}/data")
    flags = ["--data", f"{bucket}/data", "--output", f"{bucket}/out", *TRAINING, "--epochs", "100"]
    process = submit("--variant", "all_embeddings", "qwen_clip", "--wait", "--", *flags)
    number = job_id(process)
    runs = f"{bucket}/out/runs"
    wait_for(lambda: any("qwen-clip" in run and checkpoints(run) for run in storage.ls(runs)), "a checkpoint")
    cluster.run("scancel", "--signal=USR2", f"{number}_1")

    done = ended(process)
    assert done.code == 0, done.out
    endings = {re.sub(r".*/(.*)-\w+$", r"\1", run): codes(run) for run in storage.ls(runs)}
    assert endings == {"all-embeddings": [0], "qwen-clip": [75, 0]}
    assert f"{number}_1 COMPLETED with exit code 0" in done.out


def test_a_stop_request_between_two_tries_requeues_the_job(cluster: SlurmCluster, submit: Submit) -> None:
    launcher = submit.folder / "python"  # its first try fails, and after a requeue it succeeds
    launcher.write_text("#!/bin/bash\n[ ${SLURM_RESTART_COUNT:-0} -eq 1 ] || exit 69\n")
    launcher.chmod(0o755)
    submit.settings.write_text(submit.settings.read_text().replace(sys.executable, str(launcher)))
    process = submit("--wait", "--nodes=2", "--", "--data", "data")
    number = job_id(process)
    wait_for((submit.folder / "logs" / f"{number}_0_log.out").exists, "the log")
    wait_for(lambda: "next try in" in submit.log(number), "the pause")
    cluster.run("scancel", "--signal=USR2", number)
    done = ended(process)
    assert done.code == 0, done.out + submit.log(number)
    assert submit.restarts(number) == 1
    assert submit.log(number).count("next try in") == 1
    assert submit.log(number).count("stopped on request, requeued") == 1


def test_a_job_that_slurm_refuses_is_an_error(submit: Submit) -> None:
    submit.settings.write_text('partition = "nowhere"\n' + submit.settings.read_text())
    done = ended(submit("--", "--data", "data"))
    assert done.code == 78
    assert done.out.startswith(
        "error: Slurm refuses the job: sbatch: error: invalid partition specified: nowhere\nhint:"
    )
