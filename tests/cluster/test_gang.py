"""A training on two nodes by its headless Service: whatever ends one of them ends both, and both go on."""

from __future__ import annotations

import pytest

from fusion.verify.__main__ import main as verify
from tests.cluster.namespace import LONG, Namespace
from tests.manifests import Object

pytestmark = pytest.mark.cluster

# Ends the ranks of a pod as the kernel does where memory is short; the image has no tool that does.
KILL = """
import os, pathlib, signal
for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    if b"\\0RANK=" in path.read_bytes():
        os.kill(int(path.parent.name), signal.SIGKILL)
"""
JOB = "fusion-train-all-embeddings-multinode"


def training(namespace: Namespace) -> list[Object]:
    """The two pods of a training that has committed a checkpoint, node 0 first."""
    namespace.apply("base/train-all-embeddings-multinode", {**LONG, "FUSION_RUN_ID": "r"})
    namespace.first_checkpoint("r", JOB)
    return sorted(namespace.pods(JOB), key=_index)


def _index(pod: Object) -> str:
    return str(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def completes(namespace: Namespace, first: int) -> None:
    """Its first attempt ended with this code, and its second on both nodes."""
    assert namespace.ended(JOB) == "Complete"
    assert namespace.get("jobs", JOB)["status"]["succeeded"] == 2
    assert [attempt.get("code") for attempt in namespace.attempts("r")] == [first, 0]
    assert verify([f"{namespace.output}/runs/r"]) == 0


def test_gang_rank_killed(namespace: Namespace) -> None:
    _, second = training(namespace)
    namespace("exec", second["metadata"]["name"], "--container=fusion", "--", "python", "-c", KILL)
    completes(namespace, 137)


@pytest.mark.parametrize("node", [0, 1])
def test_gang_pod_deleted(namespace: Namespace, node: int) -> None:
    pods = training(namespace)
    namespace("delete", "pod", pods[node]["metadata"]["name"])
    completes(namespace, 75)
    assert not namespace.get("jobs", JOB)["status"].get("failed")
