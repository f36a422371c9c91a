"""Submits jobs to Kubernetes: fills the templates, which are the files of `k8s/`, and sends them with `kubectl`.

A job with only a variant and a task is the template itself. (The nightly prediction is sent without the flags of its
template, because a job has the same flags on every cluster.) Other settings replace the arguments of the command, the
number of nodes, the GPUs or the image; the name of such a job ends with a digest of its settings.
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
from fusion.jobs.arguments import checkout
from fusion.jobs.schedulers.description import Job
from fusion.jobs.schedulers.kubectl import BusyError, Kubectl, Object
from fusion.jobs.schedulers.kubernetes_wait import QUEUE, describe_unfinished, final_condition, log_command
from fusion.jobs.schedulers.patience import retry

K8S = checkout() / "k8s"
TEMPLATES = {
    "train": "train-all-embeddings",
    "evaluate": "evaluate-all-embeddings",
    "predict": "predict-nightly",
}
MULTINODE = "train-all-embeddings-multinode"
GPU = "nvidia.com/gpu"
TOLERATION = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}
DEVICE = {"name": "FUSION_DEVICE", "value": "cuda"}  # a job that finds no GPU ends with 78 and does not use the CPU
JOBSET = "train-all-embeddings-jobset"
SHM_FRACTION = 8  # as in the files of k8s/, /dev/shm gets an eighth of the pod's memory
TRIES = 3  # backoffLimit per node: failures of pods that a job survives
RETRY_SECONDS = 30.0  # how long to retry while the cluster is busy; short, because a user waits for the command
RETRY_PAUSE = 2.0  # seconds between two tries


def render(jobs: Sequence[Job], image: str | None = None, templates: Path = K8S) -> str:
    """The objects that are sent to kubectl, as JSON."""
    return as_text([one for job in jobs for one in objects(job, image, templates)])


def as_text(found: Sequence[Object]) -> str:
    """Objects as JSON. In YAML, parsers disagree on which unquoted words, such as 1e-05, are numbers."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": found}, indent=2) + "\n"


def objects(job: Job, image: str | None = None, templates: Path = K8S) -> list[Object]:
    """The objects of one job: Service and NetworkPolicy if it has several nodes, and last the Job or JobSet itself.

    Raises:
        ConfigError: the folder has no template for the job.
        UsageError: the job asks for cores or memory per GPU, and for no GPU.
    """
    template = MULTINODE if job.nodes > 1 else TEMPLATES[job.task]
    found = _load(templates / f"{template}.yaml")
    if job.jobset:
        found = _renamed(_as_jobset(found, templates), JOBSET, instance_name(job, image))
    found = cast(list[Object], _renamed(found, template, instance_name(replace(job, jobset=False), image)))
    _patch(_spec(found[-1]), job, image)
    if job.queue:
        found[-1]["metadata"]["labels"][QUEUE] = job.queue
    return found


def instance_name(job: Job, image: str | None = None) -> str:
    """The name of the job without `fusion-`; with a digest of its settings where it differs from the template."""
    several = ("-jobset" if job.jobset else "-multinode") if job.nodes > 1 else ""
    name = f"{job.task}-{job.variant.replace('_', '-')}{several}"
    is_template = replace(job, nodes=1, jobset=False) == Job(job.variant, job.task) and job.nodes <= 2 and not image
    return name if is_template else f"{name}-{job.digest(image or '')}"


def image_of(templates: Path = K8S) -> str:
    """The image that the files of `k8s/` name."""
    *_, job = _load(templates / f"{TEMPLATES['train']}.yaml")
    return cast(str, job["spec"]["template"]["spec"]["containers"][0]["image"])


def submit(jobs: Sequence[Job], image: str | None, kubectl: Kubectl, templates: Path = K8S) -> list[str]:
    """Starts the jobs. A job with the same name that has ended is replaced; one that has not ended is left as it is.

    Returns:
        The name of each Job, and `jobset/NAME` for each JobSet.

    Raises:
        UnreachableError: there is no kubectl here, or the cluster does not answer.
        CredentialsError: the user is not logged in, or lacks a permission.
        ConfigError: the cluster refuses the objects.
    """
    sent = [partial(_submit, objects(job, image, templates), kubectl) for job in jobs]
    return [retry(send, RETRY_SECONDS, RETRY_PAUSE, BusyError) for send in sent]


def _load(template: Path) -> list[Object]:
    try:
        found = list(yaml.safe_load_all(template.read_text()))
    except FileNotFoundError as error:
        hint = "run this in a checkout of the project, or beside a copy of its folder k8s/"
        raise ConfigError(f"there is no {template}", hint) from error
    if found[-1]["kind"] == "CronJob":  # The job is to run now, so only the Job within the CronJob is sent.
        night = found[-1]
        spec = night["spec"]["jobTemplate"]["spec"]
        found[-1] = {"apiVersion": "batch/v1", "kind": "Job", "metadata": night["metadata"], "spec": spec}
    return found


def _renamed(value: Any, before: str, after: str) -> Any:
    """A copy with `before` replaced by `after` in all texts of nested dicts and lists; keys stay as they are."""
    if isinstance(value, dict):
        return {key: _renamed(one, before, after) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, before, after) for one in value]
    return value.replace(before, after) if isinstance(value, str) else value


def _as_jobset(found: list[Object], templates: Path) -> list[Object]:
    """The objects of a job on several nodes with a JobSet in place of Job and Service, as in `overlays/jobset`."""
    policy, job = (one for one in found if one["kind"] in ("NetworkPolicy", "Job"))
    (jobset,) = _load(templates / "overlays" / "jobset" / "with-job" / "jobset.yaml")
    spec, pod = job["spec"] | {"backoffLimit": 0}, job["spec"]["template"]["spec"]
    del spec["ttlSecondsAfterFinished"], pod["subdomain"]
    first = next(entry for entry in pod["containers"][0]["env"] if entry["name"] == "MASTER_ADDR")
    first["value"] = f"fusion-{JOBSET}-nodes-0-0.fusion-{JOBSET}"
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"] = spec
    return [policy, jobset]


def _spec(found: Object) -> Object:
    """The spec of a Job, or of the Job within a JobSet."""
    if found["kind"] == "JobSet":
        return cast(Object, found["spec"]["replicatedJobs"][0]["template"]["spec"])
    return cast(Object, found["spec"])


def _patch(spec: Object, job: Job, image: str | None) -> None:
    """Writes the settings of the job into the spec of a template."""
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    # Kubernetes expands $(NAME) in arguments and turns $$ into $, so every $ is doubled.
    container["args"] = [word.replace("$", "$$") for word in job.command()]
    if image:
        container["image"] = image
    if job.nodes > 1:
        spec |= {"completions": job.nodes, "parallelism": job.nodes}
        spec["backoffLimit"] = 0 if job.jobset else TRIES * job.nodes  # a JobSet restarts all nodes by its own limit
        nodes = next(entry for entry in container["env"] if entry["name"] == "PET_NNODES")
        nodes["value"] = str(job.nodes)
    if job.gpus_per_node is not None:
        _set_gpus(pod, container, job.gpus_per_node)
    if job.priority:
        pod["priorityClassName"] = job.priority
    _set_amounts(pod, container, job)


def _set_gpus(pod: Object, container: Object, n_gpus: int) -> None:
    """Sets or removes all that a template has for GPUs: resources, FUSION_DEVICE and the toleration."""
    for amounts in container["resources"].values():
        amounts.pop(GPU, None)
        amounts |= {GPU: n_gpus} if n_gpus else {}
    env = [one for one in container.pop("env", []) if one["name"] != DEVICE["name"]]
    if env := ([dict(DEVICE)] if n_gpus else []) + env:
        container["env"] = env
    kept = [one for one in pod.pop("tolerations", []) if one != TOLERATION]
    if tolerations := kept + ([deepcopy(TOLERATION)] if n_gpus else []):
        pod["tolerations"] = tolerations


def _set_amounts(pod: Object, container: Object, job: Job) -> None:
    """Sets CPU, memory and the size of /dev/shm where the job asks for them per GPU."""
    n_gpus = container["resources"]["limits"].get(GPU, 0)
    job.check_per_gpu(n_gpus)
    for amounts in container["resources"].values():
        amounts |= {"cpu": job.cpus_per_gpu * n_gpus} if job.cpus_per_gpu else {}
        amounts |= {"memory": f"{job.memory_per_gpu * n_gpus}Gi"} if job.memory_per_gpu else {}
    if job.memory_per_gpu:
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
        shm["emptyDir"]["sizeLimit"] = f"{job.memory_per_gpu * n_gpus * 1024 // SHM_FRACTION}Mi"


def _submit(found: list[Object], kubectl: Kubectl) -> str:
    """Sends the objects of one job; returns the name of the Job, or `jobset/NAME`."""
    kind, name = found[-1]["kind"].lower(), cast(str, found[-1]["metadata"]["name"])
    resource = name if kind == "job" else f"{kind}/{name}"
    existing = kubectl.get(kind, name)
    if existing and existing["metadata"].get("deletionTimestamp"):
        message = f"{kind}/{name} is being deleted, and its pods have not ended yet"
        raise BusyError(message, "run the same command again in a minute")
    if existing and not final_condition(existing):
        print(describe_unfinished(existing, kubectl), flush=True)
        return resource
    verb = ["replace", "--force"] if existing else ["apply"]
    said = kubectl(*verb, "--filename=-", text=as_text(found))
    if found[:-1]:
        _set_owner(found[:-1], kind, name, kubectl)
    print(f"{said.strip()}\nlog: {log_command(kind, name, kubectl)}", flush=True)
    return resource


def _set_owner(found: list[Object], kind: str, name: str, kubectl: Kubectl) -> None:
    """Makes the Job or JobSet the owner of the other objects, so that Kubernetes deletes them together with it."""
    job = kubectl.get(kind, name)
    if job is None:
        return
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": job["metadata"]["name"]}
    owners = {"ownerReferences": [owner | {"uid": job["metadata"]["uid"]}]}
    kubectl("apply", "--filename=-", text=as_text([one | {"metadata": one["metadata"] | owners} for one in found]))
