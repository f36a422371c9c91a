"""jobs/submit.py --cluster k8s: what becomes of the files of k8s/, and a real kubectl that sends it.

`pytest tests/test_submit_kubernetes.py`. The API server stores objects and runs nothing: the test says how a pod ended.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.clusters import kubernetes
from jobs.clusters.description import Job
from jobs.clusters.kubernetes import objects
from tests.conftest import Done
from tests.kubernetes_api import KubernetesApi
from tests.manifests import K8S, KUBECTL, Object
from tests.test_submit import here

ROOT = Path(__file__).parents[1]
GPU = "nvidia.com/gpu"


def committed(name: str) -> list[Object]:
    return list(yaml.safe_load_all((K8S / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("file", "job"),
    [
        ("train-all-embeddings", Job("all_embeddings", "train")),
        ("train-qwen-clip", Job("qwen_clip", "train")),
        ("train-all-embeddings-multinode", Job("all_embeddings", "train", nodes=2)),
        ("evaluate-all-embeddings", Job("all_embeddings", "evaluate")),
    ],
)
def test_a_job_without_settings_is_the_committed_file(file: str, job: Job) -> None:
    assert objects(job) == committed(file)


def test_the_prediction_is_what_the_nightly_file_does_every_night() -> None:
    (night,) = committed("predict-nightly")
    spec = night["spec"]["jobTemplate"]["spec"]
    flags = tuple(spec["template"]["spec"]["containers"][0]["args"][4:])
    (job,) = objects(Job("all_embeddings", "predict", flags))
    name = job["metadata"]["name"].removeprefix("fusion-")
    assert name.startswith("predict-all-embeddings-")
    assert json.loads(json.dumps(job["spec"]).replace(name, "predict-nightly")) == spec


def test_what_differs_goes_into_the_job_and_its_name() -> None:
    *_, job = objects(Job("all_embeddings", "train", ("--lr", "0.1"), gpus_per_node=4), image="mine:1")
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][3:] == ["--nproc-per-node", "4", "fusion.all_embeddings.train", "--lr", "0.1"]
    assert container["image"] == "mine:1"
    assert {amounts[GPU] for amounts in container["resources"].values()} == {4}
    other = objects(Job("all_embeddings", "train", ("--lr", "0.2"), gpus_per_node=4), image="mine:1")[-1]
    assert len({made["metadata"]["name"] for made in (job, other, *committed("train-all-embeddings"))}) == 3


# As numbers, truth values and nothing: what YAML makes of a word differs between its versions and their readers.
WORDS = [
    "1e-05",
    "1e10",
    "089",
    "0o7",
    "1_000",
    "y",
    "No",
    "on",
    "~",
    "null",
    "2026-01-02",
    "12:30:00",
    "=",
    "<<",
    ".inf",
]


def test_what_is_sent_is_read_by_kubernetes_as_it_was_written() -> None:
    found = objects(Job("all_embeddings", "train", ("--by", *WORDS)))
    text = kubernetes.as_text(found)
    assert json.loads(text) == {"apiVersion": "v1", "kind": "List", "items": found}
    assert json.loads(here("--cluster=k8s", "--dry-run").out)["kind"] == "List"


def test_kubernetes_does_not_expand_what_is_in_arguments() -> None:
    *_, job = objects(Job("all_embeddings", "evaluate", ("--by", "$(HOME)", "US$", "$$(X)")))
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[-3:] == ["$$(HOME)", "US$$", "$$$$(X)"]


def test_several_nodes_meet_under_the_name_of_their_job() -> None:
    service, policy, job = objects(Job("qwen_clip", "train", nodes=3))
    name = job["metadata"]["name"]
    env = {one["name"]: one.get("value") for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["backoffLimit"]) == (3, 3, 9)
    assert (env["PET_NNODES"], env["MASTER_ADDR"]) == ("3", f"{name}-0.{name}")
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert "all-embeddings" not in yaml.safe_dump_all([service, policy, job])


def test_gpus_come_and_go_with_their_toleration() -> None:
    *_, without = objects(Job("all_embeddings", "train", gpus_per_node=0))
    *_, with_two = objects(Job("all_embeddings", "evaluate", gpus_per_node=2))
    pods = [job["spec"]["template"]["spec"] for job in (without, with_two)]
    assert ["tolerations" in pod for pod in pods] == [False, True]
    assert [pod["containers"][0]["resources"]["limits"].get(GPU) for pod in pods] == [None, 2]
    device = {"name": "FUSION_DEVICE", "value": "cuda"}
    assert [pod["containers"][0].get("env") for pod in pods] == [None, [device]]


class Cluster:
    """An API server, and the kubectl that `jobs/submit.py` finds first on its path."""

    def __init__(self, folder: Path) -> None:
        self.api = KubernetesApi(folder)
        self.program = folder / "kubectl"
        flags = f"--kubeconfig={self.api.kubeconfig} --cache-dir={folder}/cache"
        unchecked = 'case "$*" in *--filename*) set -- "$@" --validate=false ;; esac'  # the server has no schemas
        self.program.write_text(f'#!/bin/sh\n{unchecked}\nexec {KUBECTL} {flags} "$@"\n')
        self.program.chmod(0o755)

    def kubectl(self, *arguments: str) -> str:
        return subprocess.run([self.program, *arguments], check=True, capture_output=True, text=True).stdout

    def start(self, *flags: str) -> subprocess.Popen[str]:
        path = f"{self.program.parent}:{os.environ['PATH']}"
        command = [sys.executable, "jobs/submit.py", "--cluster=k8s", *flags]
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT)

    def submit(self, *flags: str) -> Done:
        with self.start(*flags) as process:
            out, _ = process.communicate(timeout=60)
        return Done(process.returncode, out, "")

    def end(self, name: str, condition: str, **terminated: object) -> None:
        """Says that the job has ended, and how its pod has."""
        if terminated:
            state = {"terminated": {"finishedAt": "2026-01-01T00:00:00Z", **terminated}}
            status = {"containerStatuses": [{"name": "fusion", "state": state}]}
            self.api.pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "status": status}]
        ended = {"status": {"conditions": [{"type": condition, "status": "True", "message": "as the test says"}]}}
        self.kubectl("patch", "job", name, "--type=merge", "--patch", json.dumps(ended))


def sent(process: subprocess.Popen[str]) -> None:
    """Returns once the command has sent its job, or found it running."""
    assert process.stdout
    assert process.stdout.readline().startswith("job/fusion-train-qwen-clip is running")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.api.stop()


def test_a_job_is_sent_followed_and_sent_again_when_it_has_ended(cluster: Cluster) -> None:
    name = "fusion-train-qwen-clip"
    assert f"job.batch/{name} created" in cluster.submit("--variant=qwen_clip").out
    assert cluster.submit("--variant=qwen_clip").out == f"job/{name} is running already\n"
    with cluster.start("--variant=qwen_clip", "--wait") as process:
        sent(process)
        told = "a line\nerror: train.csv is empty\nhint: fill it\n"
        cluster.end(name, "Failed", exitCode=65, message=told)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 65
    assert out.endswith("failed with exit code 65: as the test says\nerror: train.csv is empty\nhint: fill it\n")
    assert f"job.batch/{name} replaced" in cluster.submit("--variant=qwen_clip").out
    with cluster.start("--variant=qwen_clip", "--wait") as process:
        sent(process)
        cluster.end(name, "Complete")
        assert process.wait(60) == 0
    cluster.submit("--variant=qwen_clip")
    with cluster.start("--variant=qwen_clip", "--wait") as process:
        sent(process)
        cluster.kubectl("delete", "job", name)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, f"job/{name} was deleted\n")


def test_a_wait_outlasts_a_cluster_that_is_away_for_a_moment(cluster: Cluster) -> None:
    once = cluster.program.with_name("once")
    refused = (
        f'echo "The connection to the server was refused - did you specify the right host or port?" >&2; rm {once}'
    )
    script = cluster.program.read_text()
    cluster.program.write_text(script.replace("\n", f"\nif [ -e {once} ]; then {refused}; exit 1; fi\n", 1))
    cluster.submit("--variant=qwen_clip")
    with cluster.start("--variant=qwen_clip", "--wait") as process:
        sent(process)
        once.touch()
        assert process.stdout and "asking again" in process.stdout.readline()
        cluster.end("fusion-train-qwen-clip", "Complete")
        assert process.wait(60) == 0


def test_several_variants_are_several_jobs(cluster: Cluster) -> None:
    done = cluster.submit("--variant", "qwen_clip", "all_embeddings", "--", "--epochs", "5")
    assert done.code == 0, done.out
    names = re.findall(r"job.batch/(\S+) created", done.out)
    jobs = [json.loads(cluster.kubectl("get", "job", name, "--output=json")) for name in names]
    args = [job["spec"]["template"]["spec"]["containers"][0]["args"][3:] for job in jobs]
    assert args == [[f"fusion.{name}.train", "--epochs", "5"] for name in ("qwen_clip", "all_embeddings")]
