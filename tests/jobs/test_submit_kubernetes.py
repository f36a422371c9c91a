"""The objects that jobs/submit.py makes of the files of k8s/: `pytest tests/jobs/test_submit_kubernetes.py`."""

from __future__ import annotations

import json

import pytest
import yaml

from fusion.jobs.schedulers import kubernetes
from fusion.jobs.schedulers.description import Job
from fusion.jobs.schedulers.kubernetes import objects
from tests.jobs.test_submit import here
from tests.manifests import K8S, Object

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


def test_a_prediction_is_the_job_of_the_nightly_cronjob() -> None:
    (night,) = committed("predict-nightly")
    spec = night["spec"]["jobTemplate"]["spec"]
    flags = tuple(spec["template"]["spec"]["containers"][0]["args"][4:])
    (job,) = objects(Job("all_embeddings", "predict", flags))
    name = job["metadata"]["name"].removeprefix("fusion-")
    assert name.startswith("predict-all-embeddings-")
    assert json.loads(json.dumps(job["spec"]).replace(name, "predict-nightly")) == spec


def test_other_settings_change_the_job_and_its_name() -> None:
    *_, job = objects(Job("all_embeddings", "train", ("--lr", "0.1"), gpus_per_node=4), image="mine:1")
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][3:] == ["--nproc-per-node", "4", "fusion.all_embeddings.train", "--lr", "0.1"]
    assert container["image"] == "mine:1"
    assert {amounts[GPU] for amounts in container["resources"].values()} == {4}
    other = objects(Job("all_embeddings", "train", ("--lr", "0.2"), gpus_per_node=4), image="mine:1")[-1]
    assert len({made["metadata"]["name"] for made in (job, other, *committed("train-all-embeddings"))}) == 3


# Words that some YAML parsers read as numbers, booleans, dates or null.
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


def test_objects_are_sent_as_json() -> None:
    found = objects(Job("all_embeddings", "train", ("--by", *WORDS)))
    text = kubernetes.as_text(found)
    assert json.loads(text) == {"apiVersion": "v1", "kind": "List", "items": found}
    assert json.loads(here("--cluster=k8s", "--dry-run").out)["kind"] == "List"


def test_dollar_signs_in_arguments_are_escaped() -> None:
    *_, job = objects(Job("all_embeddings", "evaluate", ("--by", "$(HOME)", "US$", "$$(X)")))
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[-3:] == ["$$(HOME)", "US$$", "$$$$(X)"]


def test_several_nodes_connect_to_the_first_pod_of_their_job() -> None:
    service, policy, job = objects(Job("qwen_clip", "train", nodes=3))
    name = job["metadata"]["name"]
    env = {one["name"]: one.get("value") for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["backoffLimit"]) == (3, 3, 9)
    assert (env["PET_NNODES"], env["MASTER_ADDR"]) == ("3", f"{name}-0.{name}")
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert "all-embeddings" not in yaml.safe_dump_all([service, policy, job])


def test_gpus_are_set_and_removed_with_their_toleration() -> None:
    *_, without = objects(Job("all_embeddings", "train", gpus_per_node=0))
    *_, with_two = objects(Job("all_embeddings", "evaluate", gpus_per_node=2))
    pods = [job["spec"]["template"]["spec"] for job in (without, with_two)]
    assert ["tolerations" in pod for pod in pods] == [False, True]
    assert [pod["containers"][0]["resources"]["limits"].get(GPU) for pod in pods] == [None, 2]
    device = {"name": "FUSION_DEVICE", "value": "cuda"}
    assert [pod["containers"][0].get("env") for pod in pods] == [None, [device]]
