"""overlays/jobset with the JobSet controller and its webhooks: a training on two nodes of which one pod is killed."""

from __future__ import annotations

import pytest

from fusion.verify.__main__ import main as verify
from tests.cluster.cluster import Cluster
from tests.cluster.namespace import LONG, Namespace

pytestmark = pytest.mark.cluster

NAME = "fusion-train-all-embeddings-jobset"
JOB = f"{NAME}-nodes-0"


def test_a_jobset_restarts_all_pods_when_one_is_killed(namespace: Namespace, node: Cluster) -> None:
    namespace.apply("overlays/jobset", {**LONG, "FUSION_RUN_ID": "r"})
    namespace.first_checkpoint("r", JOB)
    before = {pod["metadata"]["uid"] for pod in namespace.pods(JOB)}
    container = namespace.pods(JOB)[1]["status"]["containerStatuses"][0]["containerID"]
    node.kubernetes().kill(container.removeprefix("containerd://"))

    def completed() -> bool:
        conditions = namespace.get("jobsets", NAME)["status"].get("conditions", [])
        return {"Completed": "True"}.items() <= {one["type"]: one["status"] for one in conditions}.items()

    namespace.until(completed, "the end of the JobSet")
    assert namespace.get("jobsets", NAME)["status"]["restarts"] == 1
    assert not before & {pod["metadata"]["uid"] for pod in namespace.pods(JOB)}
    assert [attempt.get("code") for attempt in namespace.attempts("r")][1:] == [0]
    assert verify([f"{namespace.output}/runs/r"]) == 0
