"""Jobs on Kubernetes: the files of `k8s/` are the templates, and `kubectl` sends what becomes of them.

Given only a variant and a task, what is sent is the template itself; of the nightly prediction without its flags, since
a job has the same flags on every cluster. Anything else that is given changes the command's arguments, the number of
nodes, the GPUs or the image. Such a job has a name of its own, which ends with a digest of its settings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml

from fusion.errors import ConfigError
from jobs.clusters.description import Job
from jobs.clusters.kubectl import BusyError, Kubectl, Object
from jobs.clusters.kubernetes_wait import ending, standing
from jobs.clusters.patience import patiently

K8S = Path(__file__).parents[2] / "k8s"
TEMPLATES = {
    "train": "train-all-embeddings",
    "evaluate": "evaluate-all-embeddings",
    "predict": "predict-nightly",
}
MULTINODE = "train-all-embeddings-multinode"
GPU = "nvidia.com/gpu"
TOLERATION = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
DEVICE = {"name": "FUSION_DEVICE", "value": "cuda"}  # ends with 78 where image or node have none
TRIES = 3  # counted failures that a job survives; of several nodes each counts
PATIENCE = 30.0  # seconds for which a cluster that says it is busy is asked again; somebody sits in front of it
PAUSE = 2.0


def render(jobs: Sequence[Job], image: str | None = None, templates: Path = K8S) -> str:
    """The objects that kubectl gets, as JSON."""
    return as_text([one for job in jobs for one in objects(job, image, templates)])


def as_text(found: Sequence[Object]) -> str:
    """Objects in the form that kubectl gets: JSON, because what is a number in YAML depends on who reads it (1e-05)."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": found}, indent=2) + "\n"


def objects(job: Job, image: str | None = None, templates: Path = K8S) -> list[Object]:
    """What one job consists of; the Job itself is the last.

    Raises:
        ConfigError: the folder has no template for it.
    """
    template = MULTINODE if job.nodes > 1 else TEMPLATES[job.task]
    found = _renamed(_load(templates / f"{template}.yaml"), template, instance(job, image))
    _patch(found[-1]["spec"], job, image)
    return cast(list[Object], found)


def instance(job: Job, image: str | None = None) -> str:
    """What the job is called after `fusion-`."""
    name = f"{job.task}-{job.variant.replace('_', '-')}" + ("-multinode" if job.nodes > 1 else "")
    is_template = replace(job, nodes=1) == Job(job.variant, job.task) and job.nodes <= 2 and not image
    return name if is_template else f"{name}-{job.digest(image or '')}"


def submit(jobs: Sequence[Job], image: str | None, kubectl: Kubectl, templates: Path = K8S) -> list[str]:
    """Starts the jobs, those again that have ended; names of the Jobs.

    Raises:
        UnreachableError: there is no kubectl here, or the cluster does not answer.
        CredentialsError: the cluster does not let this user.
        ConfigError: it refuses the objects.
    """
    sent = [partial(_submit, objects(job, image, templates), kubectl) for job in jobs]
    return [patiently(send, PATIENCE, PAUSE, BusyError) for send in sent]


def _load(template: Path) -> list[Object]:
    try:
        found = list(yaml.safe_load_all(template.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {template}", "run jobs/submit.py in a checkout of the project") from error
    if found[-1]["kind"] == "CronJob":  # its Job now, and not at night
        night = found[-1]
        spec = night["spec"]["jobTemplate"]["spec"]
        found[-1] = {"apiVersion": "batch/v1", "kind": "Job", "metadata": night["metadata"], "spec": spec}
    return found


def _renamed(value: Any, before: str, after: str) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(one, before, after) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, before, after) for one in value]
    return value.replace(before, after) if isinstance(value, str) else value


def _patch(spec: Object, job: Job, image: str | None) -> None:
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    container["args"] = [
        word.replace("$", "$$") for word in job.command()
    ]  # Kubernetes makes a $ of $$, and expands $(A)
    if image:
        container["image"] = image
    if job.nodes > 1:
        spec |= {"completions": job.nodes, "parallelism": job.nodes, "backoffLimit": TRIES * job.nodes}
        nodes = next(entry for entry in container["env"] if entry["name"] == "PET_NNODES")
        nodes["value"] = str(job.nodes)
    if job.gpus_per_node is not None:
        _set_gpus(pod, container, job.gpus_per_node)


def _set_gpus(pod: Object, container: Object, n_gpus: int) -> None:
    for amounts in container["resources"].values():
        amounts.pop(GPU, None)
        amounts |= {GPU: n_gpus} if n_gpus else {}
    env = [one for one in container.pop("env", []) if one["name"] != DEVICE["name"]]
    if env := ([dict(DEVICE)] if n_gpus else []) + env:
        container["env"] = env
    kept = [one for one in pod.pop("tolerations", []) if one != TOLERATION]
    if tolerations := kept + ([deepcopy(TOLERATION)] if n_gpus else []):
        pod["tolerations"] = tolerations


def _submit(found: list[Object], kubectl: Kubectl) -> str:
    name = cast(str, found[-1]["metadata"]["name"])
    existing = kubectl.get("job", name)
    if existing and not ending(existing):
        print(standing(existing, kubectl), flush=True)
        return name
    verb = ["replace", "--force"] if existing else ["apply"]
    said = kubectl(*verb, "--filename=-", text=as_text(found))
    if found[:-1]:
        _hand_over(found[:-1], name, kubectl)
    print(f"{said.strip()}\nlog: {kubectl.command} logs --follow job/{name}", flush=True)
    return name


def _hand_over(found: list[Object], name: str, kubectl: Kubectl) -> None:
    """Makes objects the Job's own, so that they are removed with it."""
    job = kubectl.get("job", name)
    if job is None:
        return
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": job["metadata"]["name"]}
    owners = {"ownerReferences": [owner | {"uid": job["metadata"]["uid"]}]}
    kubectl("apply", "--filename=-", text=as_text([one | {"metadata": one["metadata"] | owners} for one in found]))
