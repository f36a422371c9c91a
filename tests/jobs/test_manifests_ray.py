"""The RayJob of overlays/ray follows the API of KubeRay and our rules: `pytest tests/jobs/test_manifests_ray.py`.

The CRD is large, since it repeats the schema of a pod three times. So its own fields are listed here, and its pods are
checked against the schema of Kubernetes.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest

from fusion.prepare import __main__ as prepare
from fusion.prepare.requests import requests
from tests.jobs.test_manifests import VERSIONS, number
from tests.manifests import Object, one, selects, workloads

OVERLAY = "overlays/ray"
# Fields of ray.io/v1 that the file uses, in KubeRay 1.4 and later, with their types.
FIELDS = {
    "entrypoint": str, "backoffLimit": int, "activeDeadlineSeconds": int, "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int, "rayClusterSpec": dict, "submitterPodTemplate": dict,
}  # fmt: skip
CLUSTER = {"rayVersion": str, "headGroupSpec": dict, "workerGroupSpecs": list}
HEAD = {"rayStartParams": dict, "template": dict}
WORKERS = HEAD | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}


def spec() -> Object:
    return one(OVERLAY, "RayJob")["spec"]  # type: ignore[no-any-return]


def head() -> Object:
    return spec()["rayClusterSpec"]["headGroupSpec"]  # type: ignore[no-any-return]


def workers() -> Object:
    (group,) = spec()["rayClusterSpec"]["workerGroupSpecs"]
    return group  # type: ignore[no-any-return]


def templates() -> dict[str, Object]:
    return {
        "head": head()["template"], "worker": workers()["template"], "submitter": spec()["submitterPodTemplate"]
    }  # fmt: skip


def job() -> Object:
    return one("prepare", "Job")["spec"]["template"]  # type: ignore[no-any-return]


each_pod = pytest.mark.parametrize("name", ["head", "worker", "submitter"])


def test_its_fields_are_those_of_kuberay() -> None:
    for found, fields in ((spec(), FIELDS), (spec()["rayClusterSpec"], CLUSTER), (head(), HEAD), (workers(), WORKERS)):
        assert {key: type(value) for key, value in found.items()} == fields
    for group in (head(), workers()):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert workers()["minReplicas"] == workers()["replicas"] == workers()["maxReplicas"]
    assert len(one(OVERLAY, "RayJob")["metadata"]["name"]) <= 47  # KubeRay appends to it


@pytest.mark.parametrize("version", VERSIONS)
@each_pod
def test_its_pods_follow_the_schema(name: str, version: str) -> None:
    template = templates()[name]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name} | template["metadata"],
        "spec": template["spec"],
    }
    kubernetes_validate.validate(pod, version, strict=True)


@each_pod
def test_its_pods_are_those_of_the_plain_job(name: str) -> None:
    """But for what Ray needs. So security contexts, account, image, environment and volumes are those of all jobs."""
    found, plain = templates()[name]["spec"], job()["spec"]
    assert {key for key in plain if found[key] != plain[key]} <= {"containers", "volumes"}
    (container,), (of_job,) = found["containers"], plain["containers"]
    changed = {key for key in of_job | container if container.get(key) != of_job.get(key)}
    assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in container["env"]
    own = {"env", "resources"} if name == "submitter" else {"env", "readinessProbe", "livenessProbe"}
    assert changed == own | {"args"} and "args" not in container  # KubeRay writes the commands
    labels = templates()[name]["metadata"]["labels"]
    assert labels == job()["metadata"]["labels"] | {"app.kubernetes.io/instance": "prepare-ray"}


@each_pod
def test_object_stores_fit_into_shared_memory(name: str) -> None:
    (container,) = templates()[name]["spec"]["containers"]
    limits, requested = container["resources"]["limits"], container["resources"]["requests"]
    sizes = {volume["name"]: number(volume["emptyDir"]["sizeLimit"]) for volume in templates()[name]["spec"]["volumes"]}
    assert limits == requested
    assert sizes["shm"] <= number(limits["memory"]) / 4
    assert sizes["tmp"] + sizes["cache"] < number(limits["ephemeral-storage"])
    if name != "submitter":
        group = head() if name == "head" else workers()
        assert int(group["rayStartParams"]["object-store-memory"]) < sizes["shm"]


def test_the_version_of_ray_is_that_of_the_image() -> None:
    locked = re.search(r"^ray==(\S+)", Path("requirements/ray.txt").read_text(), re.MULTILINE)
    assert locked and spec()["rayClusterSpec"]["rayVersion"] == locked[1]


def test_the_entrypoint_is_the_command_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_DATA", one("config", "ConfigMap")["data"]["FUSION_DATA"])
    command = shlex.split(spec()["entrypoint"])
    assert command[:5] == ["python", "-m", "fusion.prepare", "--engine", "ray"]
    assert command[5:] == job()["spec"]["containers"][0]["args"][4:]
    given = prepare._parse(command[3:])
    assert given.to == "s3://my-bucket/data" and list(requests(given.source, given.folds)) == [
        "clip_image",
        "qwen_text",
    ]


def test_the_pods_reach_each_other_and_the_operator_reaches_the_head() -> None:
    policy = one(OVERLAY, "NetworkPolicy")["spec"]
    within, operator = policy["ingress"]
    (out,) = policy["egress"]
    peers = [policy["podSelector"], within["from"][0]["podSelector"], out["to"][0]["podSelector"]]
    for name, template in templates().items():
        assert all(selects(peer, template["metadata"]["labels"]) for peer in peers), name
    assert not any(selects(peer, work.labels) for peer in peers for work in workloads())
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]


def test_no_pod_is_part_of_a_training() -> None:
    budget = one("config", "PodDisruptionBudget")["spec"]["selector"]
    assert not any(selects(budget, template["metadata"]["labels"]) for template in templates().values())
