"""Adapts the manifests of k8s/ to a small machine, with a kustomization over each, as users write them.

It changes the image, CPUs and memory, the device where there is no GPU, and what a test asks for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from tests.manifests import K8S, Object, rendered

NAME, TAG = "registry.example.com/fusion", "0.1.0"
PODS = {
    "Job": "/spec/template/spec",
    "CronJob": "/spec/jobTemplate/spec/template/spec",
    "JobSet": "/spec/replicatedJobs/0/template/spec/template/spec",
}
REQUESTS, LIMITS = {"cpu": "50m", "memory": "200Mi"}, {"cpu": "2", "memory": "2Gi"}


def overlay(
    folder: Path,
    source: str,
    image: str,
    environment: Mapping[str, str] | None = None,
    changes: Sequence[Object] = (),
    further: Sequence[Object] = (),
) -> Path:
    """Writes a kustomization over a folder of k8s/, such as base/train-all-embeddings; returns the folder it is in.

    Args:
        environment: variables to add to the container of every workload.
        changes: JSON patches for every workload; `POD` in their paths stands for the path of its pod.
        further: patches of other objects.
    """
    objects = list(yaml.safe_load_all(rendered(K8S / source)))
    patches = [_patch(one, environment or {}, changes) for one in objects if one["kind"] in PODS]
    name, _, tag = image.rpartition(":")
    target = folder / source.replace("/", "-")
    target.mkdir(exist_ok=True)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / source, target)],
        "images": [{"name": NAME, "newName": name, "newTag": tag}],
        "patches": [*patches, *further],
    }
    (target / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return target


def _patch(work: Object, environment: Mapping[str, str], changes: Sequence[Object]) -> Object:
    path = PODS[work["kind"]]
    operations = [*_smaller(pod_of(work), path), *_settings(pod_of(work), path, environment)]
    operations += [{**one, "path": one["path"].replace("POD", path)} for one in changes]
    return {"target": {"kind": work["kind"]}, "patch": json.dumps(operations), "options": {"allowNameChange": True}}


def pod_of(work: Object) -> Object:
    """The pod template's spec of a Job, a CronJob or a JobSet."""
    found = work
    for key in PODS[work["kind"]].strip("/").split("/"):
        found = found[int(key) if key.isdecimal() else key]
    return found


def _smaller(pod: Object, path: str) -> Iterator[Object]:
    for kind in ("initContainers", "containers"):
        for number in range(len(pod.get(kind, []))):
            for which, amounts in (("requests", REQUESTS), ("limits", LIMITS)):
                for name, value in amounts.items():
                    where = f"{path}/{kind}/{number}/resources/{which}/{name}"
                    yield {"op": "replace", "path": where, "value": value}


def _settings(pod: Object, path: str, environment: Mapping[str, str]) -> Iterator[Object]:
    entries = pod["containers"][0].get("env", [])
    place = f"{path}/containers/0/env"
    for number, entry in enumerate(entries):
        if entry["name"] == "FUSION_DEVICE":
            yield {"op": "replace", "path": f"{place}/{number}/value", "value": environment.get("FUSION_DEVICE", "cpu")}
    added = [{"name": name, "value": value} for name, value in environment.items() if name != "FUSION_DEVICE"]
    if added and not entries:
        yield {"op": "add", "path": place, "value": added}
    elif added:
        yield from ({"op": "add", "path": f"{place}/-", "value": one} for one in added)
