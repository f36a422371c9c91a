"""The commands under "remove everything but the bucket" in k8s/README.md leave nothing of Fusion in the namespace."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.namespace import Namespace
from tests.manifests import FILES, K8S

pytestmark = pytest.mark.cluster

ROW = re.compile(r"^\| remove everything but the bucket \|.*$", re.MULTILINE)
OF_EVERY_NAMESPACE = {"configmap/kube-root-ca.crt", "serviceaccount/default"}


def test_the_commands_of_the_readme_remove_everything(namespace: Namespace, node: Cluster) -> None:
    namespace("create", "quota", "none", "--hard=pods=0")
    for path in FILES:
        namespace("apply", "--server-side", "--force-conflicts", "--filename", str(path))
    namespace("apply", "--server-side", "--force-conflicts", "--kustomize", str(K8S / "overlays" / "jobset"))
    namespace("create", "job", "--from=cronjob/fusion-predict-nightly", "predict-now")
    namespace("delete", "quota", "none")
    for command in _commands():
        namespace.run(*shlex.split(command)[1:])
    namespace.until(lambda: not _left(namespace), f"an empty namespace, and not {_left(namespace)}", 60)


def _commands() -> list[str]:
    (row,) = ROW.findall((K8S / "README.md").read_text())
    return [command for part in re.findall(r"`(kubectl [^`]*)`", row) for command in part.split("; ")]


def _left(namespace: Namespace) -> set[str]:
    kinds = namespace("api-resources", "--namespaced", "--verbs=list,delete", "--output=name").split()
    wanted = ",".join(kind for kind in kinds if kind != "endpoints" and not kind.startswith("events"))
    return set(namespace("get", wanted, "--output=name", "--ignore-not-found").split()) - OF_EVERY_NAMESPACE
