"""Overlays change each job that they are documented for: `pytest tests/jobs/test_manifests_overlays.py`."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from tests.manifests import K8S, OVERLAYS, Object, Workload, _jobs, kubectl, one, rendered

JOBS = sorted(path.name for path in (K8S / "base").iterdir() if path.name != "config")
BASES = [f"../../base/{name}" for name in JOBS]
# The `resources` that these overlays support, as their comments and the README say. Other overlays have fixed ones.
BELOW = {"spot": [*BASES, "../kueue", "../jobset"], "kueue": [*BASES, "../spot", "../jobset"]}
GPU = "nvidia.com/gpu"
QUEUE = {"kueue.x-k8s.io/queue-name": "fusion"}


@cache
def over(overlay: str, resource: str, without: int | None = None) -> str:
    """The output of an overlay with another resource, and without the patch of this number if one is given."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "k8s"
        shutil.copytree(K8S, copy, symlinks=True)
        path = copy / "overlays" / overlay / "kustomization.yaml"
        changed: Object = yaml.safe_load(path.read_text())
        changed["resources"] = [resource]
        if without is not None:
            del changed["patches"][without]
        path.write_text(yaml.safe_dump(changed))
        done = kubectl("kustomize", str(path.parent))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def alone(resource: str) -> str:
    """The output of a resource without an overlay; `resource` is a path as in an overlay's `resources`."""
    return rendered((K8S / "overlays" / "any" / resource).resolve())


def works(text: str) -> list[Workload]:
    return [Workload("", found, job) for found in yaml.safe_load_all(text) for job in _jobs(found)]


@pytest.mark.parametrize("resource", BELOW["spot"])
def test_the_spot_overlay_changes_every_job(resource: str) -> None:
    (plain,) = works(alone(resource))
    (spot,) = works(over("spot", resource))
    keys = {term["key"] for term in _terms(spot.pod)}
    assert {"cloud.google.com/gke-spot", "karpenter.sh/capacity-type"} <= keys
    tolerated = {toleration["key"] for toleration in spot.pod["tolerations"]}
    assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
    assert (GPU in tolerated) == (GPU in spot.container["resources"]["limits"])  # GPU nodes are not for other jobs
    settings = {"FUSION_GRACE": "15", "FUSION_CHECKPOINT_SECONDS": "20"}  # of trainings, and no CronJob trains
    assert spot.env == {**plain.env, **(settings if spot.owner["kind"] != "CronJob" else {})}
    assert spot.container["args"] == plain.container["args"]


@pytest.mark.parametrize("resource", BELOW["kueue"])
def test_the_kueue_overlay_labels_every_job(resource: str) -> None:
    """The label is on the Job or JobSet, and for a CronJob on the Jobs that it creates."""
    plain = alone(resource)
    text = over("kueue", resource)
    (work,) = works(text)
    made = work.owner["spec"]["jobTemplate"] if work.owner["kind"] == "CronJob" else work.owner
    assert QUEUE.items() <= made["metadata"]["labels"].items()
    assert not QUEUE.items() <= work.labels.items()  # pods of a Job are admitted with it
    assert work.job == works(plain)[0].job


def test_the_image_finds_the_driver_where_gke_mounts_it() -> None:
    """On GKE libcuda and nvidia-smi are not on the usual paths. A training that does not find them ends with 78."""
    text = (K8S.parent / "Dockerfile").read_text()
    assert re.search(r"^ENV PATH=\S*:/usr/local/nvidia/bin ", text, re.MULTILINE)
    assert re.search(r"^    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 ", text, re.MULTILINE)


def test_pods_reach_the_agent_of_eks_pod_identity_by_ipv4_and_ipv6() -> None:
    egress = one("overlays/eks", "NetworkPolicy")["spec"]["egress"]
    cidrs = {to["ipBlock"]["cidr"] for rule in egress for to in rule.get("to", [])}
    assert cidrs == {"169.254.170.23/32", "fd00:ec2::23/128"}


def patches() -> list[Any]:
    found = [(path.name, yaml.safe_load((path / "kustomization.yaml").read_text())) for path in OVERLAYS]
    return [
        pytest.param(name, number, BELOW.get(name, overlay["resources"]), id=f"{name}-{number}")
        for name, overlay in found
        for number in range(len(overlay.get("patches", [])))
    ]


@pytest.mark.parametrize(("overlay", "number", "below"), patches())
def test_every_patch_changes_something(overlay: str, number: int, below: list[str]) -> None:
    """kustomize silently ignores a patch whose target does not exist."""
    assert any(over(overlay, resource) != over(overlay, resource, without=number) for resource in below)


def _terms(pod: Object) -> list[Object]:
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return [term for terms in required["nodeSelectorTerms"] for term in terms["matchExpressions"]]
