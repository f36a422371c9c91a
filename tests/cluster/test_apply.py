"""Every file and overlay of k8s/, unchanged, can be applied to a real cluster without an error or a warning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import made
from tests.cluster.namespace import Namespace
from tests.manifests import FILES, K8S, OVERLAYS, Object

pytestmark = pytest.mark.cluster

APPLIED = [pytest.param("--filename", path, id=path.stem) for path in FILES]
APPLIED += [
    pytest.param("--kustomize", path, id=str(path.relative_to(K8S)))
    for path in OVERLAYS
    if path.name != "ray"  # needs KubeRay, which the cluster of the tests does not have
]


@pytest.fixture(scope="module")
def empty(node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """A namespace with a quota of no pods, because the image of the unchanged files is in no registry."""
    for namespace in made(node, "apply", tmp_path_factory):
        namespace("create", "quota", "none", "--hard=pods=0")
        namespace("delete", "--filename", str(K8S / "config.yaml"))
        yield namespace


@pytest.mark.parametrize(("flag", "path"), APPLIED)
def test_apply_again_changes_nothing_and_delete_leaves_nothing(empty: Namespace, flag: str, path: Path) -> None:
    """Warnings, such as those of Pod Security, count as failures too; see `Namespace`."""
    made = empty("apply", "--server-side", flag, str(path), "--output=name").split()
    before = _settled(empty, made)
    assert empty("apply", "--server-side", flag, str(path), "--output=name").split() == made
    assert _settled(empty, made) == before
    empty("delete", flag, str(path))
    assert not empty("get", *made, "--ignore-not-found")


def _settled(empty: Namespace, names: list[str]) -> list[Object]:
    """The objects without the fields that controllers and every write change."""
    found = json.loads(empty("get", *names, "--output=json"))
    items = found.get("items", [found])
    return [{key: one[key] for key in one if key != "status"} | {"metadata": _named(one["metadata"])} for one in items]


def _named(metadata: Object) -> Object:
    return {key: metadata.get(key) for key in ("name", "uid", "labels", "annotations")}


def test_replace_force_starts_a_job_again(empty: Namespace) -> None:
    path = str(K8S / "train-all-embeddings.yaml")
    uids = []
    for _ in range(2):
        empty("replace", "--force", "--filename", path)
        uids.append(empty.get("jobs", "fusion-train-all-embeddings")["metadata"]["uid"])
    assert len(set(uids)) == 2
    empty("delete", "--filename", path)
