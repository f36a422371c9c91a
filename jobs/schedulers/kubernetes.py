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
from jobs.schedulers.description import Job
from jobs.schedulers.kubectl import BusyError, Kubectl, Object
from jobs.schedulers.kubernetes_wait import QUEUE, ending, log_command, standing
from jobs.schedulers.patience import patiently

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
JOBSET = "train-all-embeddings-jobset"
SHM = 8  # the files of k8s/ give an eighth of the memory to /dev/shm
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
    """What one job consists of; the Job or JobSet itself is the last.

    Raises:
        ConfigError: the folder has no template for it.
        UsageError: something is asked for per GPU, and there is none.
    """
    template = MULTINODE if job.nodes > 1 else TEMPLATES[job.task]
    found = _load(templates / f"{template}.yaml")
    if job.jobset:
        found = _renamed(_as_jobset(found, templates), JOBSET, instance(job, image))
    found = cast(list[Object], _renamed(found, template, instance(replace(job, jobset=False), image)))
    _patch(_spec(found[-1]), job, image)
    if job.queue:
        found[-1]["metadata"]["labels"][QUEUE] = job.queue
    return found


def instance(job: Job, image: str | None = None) -> str:
    """What the job is called after `fusion-`."""
    several = ("-jobset" if job.jobset else "-multinode") if job.nodes > 1 else ""
    name = f"{job.task}-{job.variant.replace('_', '-')}{several}"
    is_template = replace(job, nodes=1, jobset=False) == Job(job.variant, job.task) and job.nodes <= 2 and not image
    return name if is_template else f"{name}-{job.digest(image or '')}"


def image_of(templates: Path = K8S) -> str:
    """The image of the files."""
    *_, job = _load(templates / f"{TEMPLATES['train']}.yaml")
    return cast(str, job["spec"]["template"]["spec"]["containers"][0]["image"])


def submit(jobs: Sequence[Job], image: str | None, kubectl: Kubectl, templates: Path = K8S) -> list[str]:
    """Starts the jobs, those again that have ended; names of the Jobs, and `jobset/NAME` of JobSets.

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


def _as_jobset(found: list[Object], templates: Path) -> list[Object]:
    """The objects of several nodes with a JobSet in place of Job and Service, as `overlays/jobset` has it."""
    policy, job = (one for one in found if one["kind"] in ("NetworkPolicy", "Job"))
    (jobset,) = _load(templates / "overlays" / "jobset" / "with-job" / "jobset.yaml")
    spec, pod = job["spec"] | {"backoffLimit": 0}, job["spec"]["template"]["spec"]
    del spec["ttlSecondsAfterFinished"], pod["subdomain"]
    first = next(entry for entry in pod["containers"][0]["env"] if entry["name"] == "MASTER_ADDR")
    first["value"] = f"fusion-{JOBSET}-nodes-0-0.fusion-{JOBSET}"
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"] = spec
    return [policy, jobset]


def _spec(found: Object) -> Object:
    """That of the Job, also within a JobSet."""
    if found["kind"] == "JobSet":
        return cast(Object, found["spec"]["replicatedJobs"][0]["template"]["spec"])
    return cast(Object, found["spec"])


def _patch(spec: Object, job: Job, image: str | None) -> None:
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    container["args"] = [
        word.replace("$", "$$") for word in job.command()
    ]  # Kubernetes makes a $ of $$, and expands $(A)
    if image:
        container["image"] = image
    if job.nodes > 1:
        spec |= {"completions": job.nodes, "parallelism": job.nodes}
        spec["backoffLimit"] = 0 if job.jobset else TRIES * job.nodes  # a JobSet counts its own tries
        nodes = next(entry for entry in container["env"] if entry["name"] == "PET_NNODES")
        nodes["value"] = str(job.nodes)
    if job.gpus_per_node is not None:
        _set_gpus(pod, container, job.gpus_per_node)
    if job.priority:
        pod["priorityClassName"] = job.priority
    _set_amounts(pod, container, job)


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


def _set_amounts(pod: Object, container: Object, job: Job) -> None:
    n_gpus = container["resources"]["limits"].get(GPU, 0)
    job.check_amounts(n_gpus)
    for amounts in container["resources"].values():
        amounts |= {"cpu": job.cpus_per_gpu * n_gpus} if job.cpus_per_gpu else {}
        amounts |= {"memory": f"{job.memory_per_gpu * n_gpus}Gi"} if job.memory_per_gpu else {}
    if job.memory_per_gpu:
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
        shm["emptyDir"]["sizeLimit"] = f"{job.memory_per_gpu * n_gpus * 1024 // SHM}Mi"


def _submit(found: list[Object], kubectl: Kubectl) -> str:
    kind, name = found[-1]["kind"].lower(), cast(str, found[-1]["metadata"]["name"])
    resource = name if kind == "job" else f"{kind}/{name}"
    existing = kubectl.get(kind, name)
    if existing and existing["metadata"].get("deletionTimestamp"):
        raise BusyError(f"{kind}/{name} is being deleted, and its pods have not ended yet", "send it again in a minute")
    if existing and not ending(existing):
        print(standing(existing, kubectl), flush=True)
        return resource
    verb = ["replace", "--force"] if existing else ["apply"]
    said = kubectl(*verb, "--filename=-", text=as_text(found))
    if found[:-1]:
        _hand_over(found[:-1], kind, name, kubectl)
    print(f"{said.strip()}\nlog: {log_command(kind, name, kubectl)}", flush=True)
    return resource


def _hand_over(found: list[Object], kind: str, name: str, kubectl: Kubectl) -> None:
    """Makes objects the Job's or JobSet's own, so that they are removed with it."""
    job = kubectl.get(kind, name)
    if job is None:
        return
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": job["metadata"]["name"]}
    owners = {"ownerReferences": [owner | {"uid": job["metadata"]["uid"]}]}
    kubectl("apply", "--filename=-", text=as_text([one | {"metadata": one["metadata"] | owners} for one in found]))
