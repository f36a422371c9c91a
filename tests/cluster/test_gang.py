"""A training on two nodes: when one node ends, both end, and both resume."""

from __future__ import annotations

import pytest

from fusion.verify.__main__ import main as verify
from tests.cluster.namespace import LONG, Namespace
from tests.manifests import Object

pytestmark = pytest.mark.cluster

# Kills the ranks of a pod as the kernel does when memory runs out. The image has no tool such as pkill.
KILL = """
import os, pathlib, signal
for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    if b"\\0RANK=" in path.read_bytes():
        os.kill(int(path.parent.name), signal.SIGKILL)
"""
JOB = "fusion-train-all-embeddings-multinode"


def training(namespace: Namespace) -> list[Object]:
    """Starts a training; returns its two pods, node 0 first, when it has committed a checkpoint."""
    namespace.apply("base/train-all-embeddings-multinode", {**LONG, "FUSION_RUN_ID": "r"})
    namespace.first_checkpoint("r", JOB)
    return sorted(namespace.pods(JOB), key=_index)


def _index(pod: Object) -> str:
    return str(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def completes(namespace: Namespace, first: int) -> None:
    """Asserts that the first attempt ended with this code, and the second with 0 on both nodes."""
    assert namespace.ended(JOB) == "Complete"
    assert namespace.get("jobs", JOB)["status"]["succeeded"] == 2
    assert [attempt.get("code") for attempt in namespace.attempts("r")] == [first, 0]
    assert verify([f"{namespace.output}/runs/r"]) == 0


def test_both_nodes_resume_after_a_rank_is_killed(namespace: Namespace) -> None:
    _, second = training(namespace)
    namespace("exec", second["metadata"]["name"], "--container=fusion", "--", "python", "-c", KILL)
    completes(namespace, 137)


@pytest.mark.parametrize("node", [0, 1])
def test_both_nodes_resume_after_a_pod_is_deleted(namespace: Namespace, node: int) -> None:
    pods = training(namespace)
    namespace("delete", "pod", pods[node]["metadata"]["name"])
    completes(namespace, 75)
    assert not namespace.get("jobs", JOB)["status"].get("failed")
