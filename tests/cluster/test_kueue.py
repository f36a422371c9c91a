"""overlays/kueue with Kueue's controller and its webhooks: order of a full queue, and preemption."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.namespace import LONG, Namespace
from tests.manifests import Object

pytestmark = pytest.mark.cluster

API = "kueue.x-k8s.io/v1beta2"
RESOURCES = ("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu")
PRIORITY = "kueue.x-k8s.io/priority-class"
SHORT = {"FUSION_EPOCHS": "3"}


@pytest.fixture
def queue(namespace: Namespace, node: Cluster) -> Iterator[Namespace]:
    """A namespace whose LocalQueue `fusion` has a quota of one GPU, and so room for one job."""
    name = namespace.name
    quotas = [{"name": one, "nominalQuota": 1 if "gpu" in one else "100Gi"} for one in RESOURCES]
    flavors = [{"name": name, "resources": quotas}]
    spec = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}},
        "resourceGroups": [{"coveredResources": list(RESOURCES), "flavors": flavors}],
        "preemption": {"withinClusterQueue": "LowerPriority"},
    }
    made = [
        _object("ResourceFlavor", name),
        _object("ClusterQueue", name, spec=spec),
        _object("LocalQueue", "fusion", namespace=name, spec={"clusterQueue": name}),
        _object("WorkloadPriorityClass", name, value=1000),
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": made})
    namespace("apply", "--filename=-", text=text)
    yield namespace
    namespace.run("delete", "job", "--all")
    namespace.run("delete", "--filename=-", "--wait=false", text=text)


def _object(kind: str, name: str, namespace: str = "", **rest: object) -> Object:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": API, "kind": kind, "metadata": metadata, **rest}


def start(queue: Namespace, name: str, environment: dict[str, str], priority: str = "") -> None:
    changes = [{"op": "replace", "path": "/metadata/name", "value": name}]
    changes += [{"op": "add", "path": f"/metadata/labels/{PRIORITY.replace('/', '~1')}", "value": priority}] * bool(
        priority
    )
    queue.apply("overlays/kueue", {**environment, "FUSION_RUN_ID": name}, changes)


def is_admitted(queue: Namespace, name: str) -> bool:
    return not queue.get("jobs", name)["spec"]["suspend"]


def test_kueue_admits_jobs_in_the_order_of_the_queue(queue: Namespace) -> None:
    names = ["first", "second", "third"]
    for number, name in enumerate(names):
        start(queue, name, SHORT)
        queue.until(lambda number=number: len(queue.items("workloads")) > number, f"Kueue to see {name}")
        time.sleep(1)  # Kueue orders workloads by their creationTimestamp, which has whole seconds
    assert [is_admitted(queue, name) for name in names] == [True, False, False]
    assert [queue.ended(name) for name in names] == ["Complete"] * 3
    ended = [queue.get("jobs", name)["status"] for name in names]
    times = [(status["startTime"], status["completionTime"]) for status in ended]
    assert all(end <= start for (_, end), (start, _) in pairwise(times)), times


def test_a_training_preempted_by_kueue_commits_and_resumes(queue: Namespace) -> None:
    start(queue, "cheap", LONG)
    queue.first_checkpoint("cheap", "cheap")
    start(queue, "urgent", SHORT, priority=queue.name)
    assert queue.ended("urgent") == "Complete"
    assert queue.ended("cheap") == "Complete"
    assert [attempt.get("code") for attempt in queue.attempts("cheap")] == [75, 0]
    assert not queue.get("jobs", "cheap")["status"].get("failed")
