"""A training that a cluster interrupts in various ways resumes, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json

import pytest

from fusion import storage
from tests.cluster.cluster import Cluster
from tests.cluster.kubernetes import NODE
from tests.cluster.namespace import LONG, Namespace
from tests.conftest import BUCKET
from tests.manifests import Object

pytestmark = pytest.mark.cluster

SOURCE, JOB = "base/train-qwen-clip", "fusion-train-qwen-clip"
MODEL = f"s3://{BUCKET}/interrupted.sha256"  # the digest of the weights that all trainings of this file must end with


def training(namespace: Namespace) -> Object:
    """Starts a training; returns its pod when it has committed a checkpoint."""
    namespace.apply(SOURCE, {**LONG, "FUSION_RUN_ID": "r"})
    namespace.first_checkpoint("r", JOB)
    (pod,) = namespace.pods(JOB)
    return pod


def completes(namespace: Namespace, *codes: int | None, failed: int = 0) -> None:
    """Asserts that the training completes with the same weights as all others of this file.

    Args:
        codes: exit codes of its attempts before the last one; None for an attempt that was killed.
        failed: number of failures that Kubernetes counts.
    """
    assert namespace.ended(JOB) == "Complete"
    assert [attempt.get("code") for attempt in namespace.attempts("r")] == [*codes, 0]
    assert namespace.get("jobs", JOB)["status"].get("failed", 0) == failed
    last = max(namespace.checkpoints("r"))
    found = hashlib.sha256(storage.read(f"{last}/model.safetensors")).hexdigest()
    storage.create(MODEL, found.encode())  # has no effect if another test has written it
    assert storage.read(MODEL).decode() == found


def test_a_training_resumes_after_its_pod_is_deleted(namespace: Namespace) -> None:
    pod = training(namespace)
    namespace("delete", "pod", pod["metadata"]["name"])
    completes(namespace, 75)


def test_a_training_resumes_after_its_node_is_drained(namespace: Namespace, node: Cluster) -> None:
    training(namespace)
    uid = namespace.get("jobs", JOB)["metadata"]["uid"]
    # By uid, because other tests have jobs with the same name.
    of_job = f"--pod-selector=batch.kubernetes.io/controller-uid={uid}"
    done = namespace.run("drain", NODE, of_job, "--delete-emptydir-data", "--ignore-daemonsets")
    namespace("uncordon", NODE)
    assert not done.returncode, done.stderr
    completes(namespace, 75)


def test_a_training_resumes_after_its_container_is_killed(namespace: Namespace, node: Cluster) -> None:
    pod = training(namespace)
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    node.kubernetes().kill(container)
    completes(namespace, None, failed=1)


def test_a_training_resumes_after_it_was_suspended(namespace: Namespace) -> None:
    training(namespace)
    namespace("patch", "job", JOB, '--patch={"spec": {"suspend": true}}')
    namespace.until(lambda: not namespace.pods(JOB), "the end of the pod")
    namespace("patch", "job", JOB, '--patch={"spec": {"suspend": false}}')
    completes(namespace, 75)


def test_a_training_resumes_after_its_deadline_when_sent_again(namespace: Namespace) -> None:
    training(namespace)
    namespace("patch", "job", JOB, '--patch={"spec": {"activeDeadlineSeconds": 1}}')
    assert namespace.ended(JOB) == "DeadlineExceeded"
    namespace.until(lambda: namespace.attempts("r")[0], "the commit of the stopped training")
    namespace("delete", "job", JOB)
    namespace.apply(SOURCE, {**LONG, "FUSION_RUN_ID": "r"})
    completes(namespace, 75)


def test_a_training_continues_when_its_node_is_lost_and_returns(namespace: Namespace, node: Cluster) -> None:
    """The kubelet is stopped until the node counts as lost; the containers run on."""
    before = training(namespace)
    kubelet = node.kubernetes().service("kubelet")
    kubelet.stop()
    try:
        namespace.until(lambda: _ready(namespace) != "True", "a node that is lost")
    finally:
        kubelet.start()
    namespace.until(lambda: _ready(namespace) == "True", "the node's return")
    completes(namespace)
    (after,) = namespace.pods(JOB)
    assert after["metadata"]["uid"] == before["metadata"]["uid"]


def _ready(namespace: Namespace) -> str:
    conditions = json.loads(namespace("get", "node", NODE, "--output=json"))["status"]["conditions"]
    return str(next(one["status"] for one in conditions if one["type"] == "Ready"))
