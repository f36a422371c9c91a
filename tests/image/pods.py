"""Runs the pod of a Job under podman as a cluster would, with its security context, volumes, environment and signals.

`podman kube play` does not accept a Job, so a Pod is made of its template. Changed are the image's registry, the
resources (there is no GPU), and the network, which is the host's so that pods reach the S3 server on loopback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.image.engine import IMAGE, podman
from tests.manifests import Object, one, workloads

CONFIG, SECRET = "fusion-config", "fusion-credentials"
RESOURCES = {"cpu": "1", "memory": "3Gi"}


@dataclass(frozen=True)
class Pod:
    """A running pod. Its container is called fusion, as in all manifests.

    Attributes:
        grace: seconds between SIGTERM and SIGKILL.
    """

    name: str
    grace: int

    @property
    def container(self) -> str:
        return f"{self.name}-fusion"

    def wait(self) -> int:
        """Waits until the container has ended; returns its exit code."""
        return int(podman("wait", self.container))

    def stop(self) -> None:
        """Stops the pod as a kubelet does: sends SIGTERM, and SIGKILL after the pod's grace period."""
        podman("stop", "--time", str(self.grace), self.container)

    def log(self) -> str:
        """The container's standard output and standard error."""
        return podman("logs", self.container, errors=True)


@contextmanager
def playing(
    source: str, settings: Mapping[str, str], keys: Mapping[str, str], folder: Path, args: Sequence[str] = ()
) -> Iterator[Pod]:
    """Runs the pod of the Job or CronJob in a file or overlay of k8s/; prints its log at the end.

    Args:
        settings: override entries of the ConfigMap.
        keys: entries of the Secret.
        folder: where to write the manifest for podman.
        args: replace the container's arguments.
    """
    config = {**one("config", "ConfigMap")["data"], **settings}
    pod = _pod(source, args, config)
    name, environment = pod["metadata"]["name"], [_config_map(CONFIG, config), _config_map(SECRET, keys)]
    manifest = folder / f"{name}.yaml"
    manifest.write_text(yaml.safe_dump_all([*environment, pod]))
    podman("kube", "play", "--quiet", str(manifest))
    started = Pod(name, pod["spec"]["terminationGracePeriodSeconds"])
    try:
        yield started
    finally:
        print(started.log())  # pytest shows it when the test fails
        podman("kube", "down", str(manifest))


def _pod(source: str, args: Sequence[str], config: Mapping[str, str]) -> Object:
    """The Pod that podman gets, made of the template of a Job."""
    (work,) = (work for work in workloads() if work.source == source)
    spec = deepcopy(work.pod)
    spec["hostNetwork"] = True
    for container in spec["containers"] + spec.get("initContainers", []):
        container |= {"image": IMAGE, "imagePullPolicy": "Never"}
        container["resources"] = {"requests": RESOURCES, "limits": RESOURCES}
        for entry in container.get("env", []):
            entry |= {"value": "cpu"} if entry["name"] == "FUSION_DEVICE" else {}
        # podman 4.3 cannot read a Secret from a manifest, so the Secret is given as a ConfigMap.
        container["envFrom"] = [{"configMapRef": next(iter(place.values()))} for place in container.get("envFrom", [])]
    main = spec["containers"][0]
    # A kubelet replaces $(NAME) in arguments; podman 4.3 does not.
    main["args"] = list(args) or [re.sub(r"\$\((\w+)\)", lambda name: config[name[1]], arg) for arg in main["args"]]
    _leave_shm_to_podman(spec)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": work.owner["metadata"]["name"]}, "spec": spec}


def _leave_shm_to_podman(spec: Object) -> None:
    """Removes the volumes in memory: podman mounts /dev/shm itself, and makes such an emptyDir a folder of root."""
    in_memory = {volume["name"] for volume in spec["volumes"] if volume["emptyDir"].get("medium") == "Memory"}
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] not in in_memory]
    for container in spec["containers"]:
        container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] not in in_memory]


def _config_map(name: str, data: Mapping[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": dict(data)}
