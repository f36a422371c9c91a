"""Prepares the cluster that the tests run on: that of KUBECONFIG, or one that is started for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster import operators, store
from tests.cluster.api import Api
from tests.cluster.kubernetes import Kubernetes
from tests.cluster.one_layer import one_layer
from tests.cluster.services import Service, free_ports, listens, until
from tests.image import engine
from tests.manifests import KUBECTL

PACKAGES = ("containerd", "runc", "containernetworking-plugins", "iptables", "iproute2", "openssl")
VARIABLE = "FUSION_TEST_CLUSTER"


@dataclass(frozen=True)
class Cluster:
    """What tests must know about the cluster.

    Attributes:
        image: name of the project's image on the cluster.
        endpoint: URL of the S3 server for this machine; pods use `store.ENDPOINT`.
        proxy: path of the socket of a `kubectl proxy`.
        folder: folder of a cluster that was started for the tests; empty for that of KUBECONFIG.
    """

    kubeconfig: str
    image: str
    endpoint: str
    proxy: str
    folder: str = ""

    @classmethod
    def of_tests(cls) -> Cluster | None:
        """The cluster that `python -m tests.cluster` has prepared; None in a process that it did not start."""
        found = os.environ.get(VARIABLE)
        return cls(**json.loads(found)) if found else None

    @property
    def api(self) -> Api:
        return Api(self.proxy)

    def kubernetes(self) -> Kubernetes:
        """The Kubernetes that was started for the tests."""
        return Kubernetes(Path(self.folder), Path(os.environ.get("FUSION_KUBERNETES", "")))

    def variables(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self)), "KUBECONFIG": self.kubeconfig}


class MissingError(Exception):
    """There is no cluster to test on; the message says why."""


@contextmanager
def prepared() -> Iterator[Cluster]:
    """The cluster of KUBECONFIG, else a new one from the folder that FUSION_KUBERNETES names, with a filled S3 server.

    Raises:
        MissingError: there is neither.
    """
    given, binaries = os.environ.get("KUBECONFIG"), os.environ.get("FUSION_KUBERNETES")
    if given:
        with _on(given) as cluster:
            yield cluster
    elif binaries:
        with started(Path(binaries)) as cluster:
            yield cluster
    else:
        raise MissingError("expected KUBECONFIG, or FUSION_KUBERNETES with the folder to start a cluster from")


@contextmanager
def started(binaries: Path) -> Iterator[Cluster]:
    """A new cluster with the project's image, JobSet, Kueue and a filled S3 server, which is removed afterwards."""
    _require_tools()
    image = engine.build()
    folder = Path(tempfile.mkdtemp(prefix="fusion-cluster-"))
    kubernetes = Kubernetes(folder, binaries)
    try:
        kubernetes.start([lambda: _bring_image(kubernetes, image), lambda: _bring_store(kubernetes)])
        operators.start(kubernetes)
        kubernetes.kubectl("apply", "--filename=-", text=store.manifest(store.IMAGE))
        _wait_for_store(str(kubernetes.kubeconfig))
        endpoint = f"http://{_address(kubernetes)}:{store.PORT}"
        store.fill(endpoint)
        with _proxy(folder, str(kubernetes.kubeconfig)) as proxy:
            yield Cluster(str(kubernetes.kubeconfig), image, endpoint, proxy, str(folder))
    finally:
        kubernetes.stop()
        operators.remove_traces()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _on(kubeconfig: str) -> Iterator[Cluster]:
    image, of_store = os.environ.get("FUSION_TEST_IMAGE"), os.environ.get("FUSION_TEST_STORE_IMAGE")
    if not image or not of_store:
        raise MissingError(
            "with KUBECONFIG, set FUSION_TEST_IMAGE to the project's image, and FUSION_TEST_STORE_IMAGE to one of "
            "SeaweedFS whose entry point is weed"
        )
    kubectl = [KUBECTL, f"--kubeconfig={kubeconfig}"]
    subprocess.run([*kubectl, "apply", "--filename=-"], check=True, input=store.manifest(of_store), text=True)
    try:
        _wait_for_store(kubeconfig)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            endpoint = stack.enter_context(_forwarded(folder, kubectl))
            store.fill(endpoint)
            yield Cluster(kubeconfig, image, endpoint, stack.enter_context(_proxy(folder, kubeconfig)))
    finally:
        subprocess.run([*kubectl, "delete", "namespace", store.NAMESPACE], check=False)


@contextmanager
def _forwarded(folder: Path, kubectl: list[str]) -> Iterator[str]:
    (port,) = free_ports(1)
    service = Service(folder, "port-forward")
    service.run(*kubectl, "port-forward", f"--namespace={store.NAMESPACE}", "pod/store", f"{port}:{store.PORT}")
    try:
        until(lambda: listens(port), "the S3 server")
        yield f"http://127.0.0.1:{port}"
    finally:
        service.stop()


@contextmanager
def _proxy(folder: Path, kubeconfig: str) -> Iterator[str]:
    service, path = Service(folder, "proxy"), folder / "proxy.sock"
    service.run(KUBECTL, f"--kubeconfig={kubeconfig}", "proxy", f"--unix-socket={path}")
    try:
        until(path.exists, "kubectl proxy")
        yield str(path)
    finally:
        service.stop()


def _address(kubernetes: Kubernetes) -> str:
    of_pod = "get", "pod", "store", f"--namespace={store.NAMESPACE}", "--output=jsonpath={.status.podIP}"
    return kubernetes.kubectl(*of_pod)


def _wait_for_store(kubeconfig: str) -> None:
    where = f"--kubeconfig={kubeconfig}", f"--namespace={store.NAMESPACE}"
    command = [KUBECTL, *where, "wait", "--for=condition=Ready", "pod/store", "--timeout=180s"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _require_tools() -> None:
    if os.geteuid():
        raise MissingError("only root can start a node")
    if not engine.available():
        raise MissingError(f"podman and buildah are missing; on Debian: apt-get install {' '.join(engine.PACKAGES)}")
    if not _has_tools() and shutil.which("apt-get"):
        engine.install(*PACKAGES)
    if not _has_tools():
        raise MissingError(f"containerd is missing; on Debian: apt-get install {' '.join(PACKAGES)}")


def _has_tools() -> bool:
    tools = ("containerd", "ctr", "runc", "openssl", "ip")
    return all(shutil.which(tool) for tool in tools) and Path("/usr/lib/cni/bridge").exists()


def _bring_image(kubernetes: Kubernetes, name: str) -> None:
    command = ["podman", "save", "--quiet", "--format=docker-archive", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=engine.environment()) as saving:
        assert saving.stdout
        kubernetes.load(saving.stdout)
    assert not saving.returncode, f"podman save ended with {saving.returncode}"


def _bring_store(kubernetes: Kubernetes) -> None:
    weed = Path(sys.executable).with_name("weed")
    archive = one_layer(kubernetes.folder / "weed.tar", store.IMAGE, {"weed": weed})
    kubernetes.load(archive)
    archive.unlink()
