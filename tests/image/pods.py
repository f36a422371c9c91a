"""Runs the pod of a Job under podman as a cluster would: its own security context, volumes, environment and signals.

`podman kube play` refuses a Job, so its template is lifted into a Pod. Changed is only what the machine has not: the
image's registry, the resources with the GPU, and the network, which is the host's so that the S3 server on loopback is
reached.
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
    """A pod that was started; its container is called fusion, as in all manifests."""

    name: str
    grace: int

    @property
    def container(self) -> str:
        return f"{self.name}-fusion"

    def wait(self) -> int:
        """Exit code of the container, once it has ended."""
        return int(podman("wait", self.container))

    def stop(self) -> None:
        """Ends it as a kubelet does: SIGTERM, and SIGKILL when the pod's grace period is over."""
        podman("stop", "--time", str(self.grace), self.container)

    def log(self) -> str:
        """What the container has written to its standard output and its standard error."""
        return podman("logs", self.container, errors=True)


@contextmanager
def playing(
    source: str, settings: Mapping[str, str], keys: Mapping[str, str], folder: Path, args: Sequence[str] = ()
) -> Iterator[Pod]:
    """The pod of the Job or CronJob in a file or overlay of k8s/, in an environment of ConfigMap and Secret.

    `settings` go over those of the ConfigMap, `keys` are the Secret's, `args` replace the container's own. What podman
    is given is written to the folder. The pod's log is printed at its end.
    """
    config = {**one("config", "ConfigMap")["data"], **settings}
    pod = _lifted(source, args, config)
    name, environment = pod["metadata"]["name"], [_config_map(CONFIG, config), _config_map(SECRET, keys)]
    manifest = folder / f"{name}.yaml"
    manifest.write_text(yaml.safe_dump_all([*environment, pod]))
    podman("kube", "play", "--quiet", str(manifest))
    started = Pod(name, pod["spec"]["terminationGracePeriodSeconds"])
    try:
        yield started
    finally:
        print(started.log())  # pytest shows it where the test fails
        podman("kube", "down", str(manifest))


def _lifted(source: str, args: Sequence[str], config: Mapping[str, str]) -> Object:
    (work,) = (work for work in workloads() if work.source == source)
    spec = deepcopy(work.pod)
    spec["hostNetwork"] = True
    for container in spec["containers"] + spec.get("initContainers", []):
        container |= {"image": IMAGE, "imagePullPolicy": "Never"}
        container["resources"] = {"requests": RESOURCES, "limits": RESOURCES}
        for entry in container.get("env", []):
            entry |= {"value": "cpu"} if entry["name"] == "FUSION_DEVICE" else {}
        # podman 4.3 cannot read a Secret that it was given in a manifest
        container["envFrom"] = [{"configMapRef": next(iter(place.values()))} for place in container.get("envFrom", [])]
    main = spec["containers"][0]
    # as a kubelet replaces $(NAME), and podman 4.3 does not
    main["args"] = list(args) or [re.sub(r"\$\((\w+)\)", lambda name: config[name[1]], arg) for arg in main["args"]]
    _leave_shm_to_podman(spec)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": work.owner["metadata"]["name"]}, "spec": spec}


def _leave_shm_to_podman(spec: Object) -> None:
    """Podman's own /dev/shm is memory; an emptyDir there becomes a folder on disk that belongs to root."""
    in_memory = {volume["name"] for volume in spec["volumes"] if volume["emptyDir"].get("medium") == "Memory"}
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] not in in_memory]
    for container in spec["containers"]:
        container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] not in in_memory]


def _config_map(name: str, data: Mapping[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": dict(data)}
