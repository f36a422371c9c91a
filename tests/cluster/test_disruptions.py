"""A training that is interrupted in every way that a cluster knows: it goes on, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json

import pytest

from fusion import storage
from tests.cluster.kubernetes import NODE
from tests.cluster.namespace import LONG, Namespace
from tests.cluster.place import Place
from tests.conftest import BUCKET
from tests.manifests import Object

pytestmark = pytest.mark.cluster

SOURCE, JOB = "base/train-qwen-clip", "fusion-train-qwen-clip"
MODEL = f"s3://{BUCKET}/interrupted.sha256"  # of the weights that every training of this file ends with


def training(namespace: Namespace) -> Object:
    """The pod of a training that has committed a checkpoint."""
    namespace.apply(SOURCE, {**LONG, "FUSION_RUN_ID": "r"})
    namespace.first_checkpoint("r", JOB)
    (pod,) = namespace.pods(JOB)
    return pod


def completes(namespace: Namespace, *codes: int | None, failed: int = 0) -> None:
    """Its attempts have ended with these codes (None: killed before it could tell), and it with the weights of all."""
    assert namespace.ended(JOB) == "Complete"
    assert [attempt.get("code") for attempt in namespace.attempts("r")] == [*codes, 0]
    assert namespace.get("jobs", JOB)["status"].get("failed", 0) == failed
    last = max(namespace.checkpoints("r"))
    found = hashlib.sha256(storage.read(f"{last}/model.safetensors")).hexdigest()
    storage.create(MODEL, found.encode())  # unless another has
    assert storage.read(MODEL).decode() == found


def test_deleted(namespace: Namespace) -> None:
    pod = training(namespace)
    namespace("delete", "pod", pod["metadata"]["name"])
    completes(namespace, 75)


def test_drained(namespace: Namespace, node: Place) -> None:
    training(namespace)
    uid = namespace.get("jobs", JOB)["metadata"]["uid"]
    of_job = f"--pod-selector=batch.kubernetes.io/controller-uid={uid}"  # other tests have jobs of this name
    done = namespace.run("drain", NODE, of_job, "--delete-emptydir-data", "--ignore-daemonsets")
    namespace("uncordon", NODE)
    assert not done.returncode, done.stderr
    completes(namespace, 75)


def test_container_killed(namespace: Namespace, node: Place) -> None:
    pod = training(namespace)
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    node.kubernetes().kill(container)
    completes(namespace, None, failed=1)


def test_suspended(namespace: Namespace) -> None:
    training(namespace)
    namespace("patch", "job", JOB, '--patch={"spec": {"suspend": true}}')
    namespace.until(lambda: not namespace.pods(JOB), "the end of the pod")
    namespace("patch", "job", JOB, '--patch={"spec": {"suspend": false}}')
    completes(namespace, 75)


def test_out_of_time(namespace: Namespace) -> None:
    training(namespace)
    namespace("patch", "job", JOB, '--patch={"spec": {"activeDeadlineSeconds": 1}}')
    assert namespace.ended(JOB) == "DeadlineExceeded"
    namespace.until(lambda: namespace.attempts("r")[0], "the commit of the stopped training")
    namespace("delete", "job", JOB)
    namespace.apply(SOURCE, {**LONG, "FUSION_RUN_ID": "r"})
    completes(namespace, 75)


def test_node_lost_and_back(namespace: Namespace, node: Place) -> None:
    """The kubelet is away for longer than a node may be; the containers do not notice."""
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
