"""Jobs on Kubernetes: the files of `k8s/` are the templates, and `kubectl` sends what becomes of them.

Given only a variant and a task, what is sent is the template itself; of the nightly prediction without its flags, since
a job has the same flags on every cluster. Anything else that is given changes the command's arguments, the number of
nodes, the GPUs or the image. Such a job has a name of its own, which ends with a digest of its settings.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from fusion.errors import ConfigError, CredentialsError, FusionError, UnreachableError
from jobs.clusters.description import Job
from jobs.clusters.errors import last_error

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
NO_ANSWER = (
    "refused", "Unable to connect", "timeout", "timed out", "no such host", "unexpected EOF", "reset by peer",
    "connection lost", "unable to handle the request", "InternalError", "TooManyRequests",
)  # fmt: skip
TRIES = 3  # counted failures that a job survives; of several nodes each counts
POLL = 5.0  # seconds between two looks at a job
PATIENCE = 300.0  # seconds that a wait goes on without an answer of the cluster

Object = dict[str, Any]
T = TypeVar("T")


def render(jobs: Sequence[Job], image: str | None = None, templates: Path = K8S) -> str:
    """The objects that kubectl gets, as YAML."""
    found = [one for job in jobs for one in objects(job, image, templates)]
    return yaml.safe_dump_all(found, sort_keys=False, width=120, explicit_start=True)


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


def submit(jobs: Sequence[Job], image: str | None, namespace: str | None, templates: Path = K8S) -> list[str]:
    """Starts the jobs, those again that have ended; names of the Jobs.

    Raises:
        UnreachableError: there is no kubectl here, or the cluster does not answer.
        CredentialsError: the cluster does not let this user.
        ConfigError: it refuses the objects.
    """
    return [_submit(objects(job, image, templates), namespace) for job in jobs]


def wait(names: Sequence[str], namespace: str | None) -> int:
    """Exit code of the first of these Jobs that failed, and 0 when there is none; tells why it did."""
    codes = [_wait(name, namespace) for name in names]
    return next((code for code in codes if code), 0)


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
    container["args"] = job.command()
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


def _submit(found: list[Object], namespace: str | None) -> str:
    name = cast(str, found[-1]["metadata"]["name"])
    existing = _find(name, namespace)
    if existing and not _condition(existing):
        print(f"job/{name} is running already", flush=True)
        return name
    verb = ["replace", "--force"] if existing else ["apply"]
    said = _kubectl(namespace, *verb, "--filename=-", text=yaml.safe_dump_all(found, sort_keys=False))
    print(f"{said.strip()}\nlog: kubectl logs --follow job/{name}", flush=True)
    return name


def _wait(name: str, namespace: str | None) -> int:
    while (job := _patiently(lambda: _find(name, namespace))) and not _condition(job):
        time.sleep(POLL)
    if job is None:
        print(f"job/{name} was deleted", flush=True)
        return 128 + signal.SIGTERM
    condition = _condition(job) or {}
    if condition["type"] == "Complete":
        print(f"job/{name} is complete", flush=True)
        return 0
    ended = _patiently(lambda: _last_failure(name, namespace))
    code = int(ended.get("exitCode", 1))
    print(f"job/{name} failed with exit code {code}: {condition.get('message', '')}", flush=True)
    print(last_error(ended.get("message", "")) or ended.get("reason", ""), flush=True)
    return code


def _patiently(ask: Callable[[], T]) -> T:
    """The answer of the cluster, asked again for a while when there is none: the job runs on without us."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return ask()
        except UnreachableError as error:
            if time.monotonic() > deadline:
                raise
            print(f"{error.message}; asking again", flush=True)
            time.sleep(POLL)


def _find(name: str, namespace: str | None) -> Object | None:
    said = _kubectl(namespace, "get", "job", name, "--ignore-not-found", "--output=json")
    return json.loads(said) if said.strip() else None


def _condition(job: Object) -> Object | None:
    """How a Job has ended; None while it has not."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((one for one in conditions if one["type"] in ("Complete", "Failed") and one["status"] == "True"), None)


def _last_failure(name: str, namespace: str | None) -> Object:
    """The terminated state of the container that failed last: exitCode, message, reason."""
    pods = _kubectl(namespace, "get", "pods", f"--selector=batch.kubernetes.io/job-name={name}", "--output=json")
    statuses = [status for pod in json.loads(pods)["items"] for status in pod["status"].get("containerStatuses", [])]
    ended = [status["state"]["terminated"] for status in statuses if "terminated" in status["state"]]
    return max((one for one in ended if one["exitCode"]), key=lambda one: one["finishedAt"], default={})


def _kubectl(namespace: str | None, *arguments: str, text: str | None = None) -> str:
    command = ["kubectl", *([f"--namespace={namespace}"] if namespace else []), *arguments]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, input=text)
    except FileNotFoundError as error:
        raise UnreachableError(
            "there is no kubectl here", "install kubectl, and give it access to the cluster"
        ) from error
    if done.returncode:
        raise _refusal(done.stderr.strip())
    return done.stdout


def _refusal(said: str) -> FusionError:
    first = said.splitlines()[-1] if said else "kubectl failed without a word"
    if any(word in said for word in NO_ANSWER):
        return UnreachableError(f"the cluster does not answer: {first}", "see `kubectl cluster-info`")
    if any(word in said for word in ("orbidden", "Unauthorized")):
        return CredentialsError(f"the cluster does not let you: {first}", "see `kubectl auth whoami`")
    return ConfigError(f"the cluster refuses the job: {first}", "see `kubectl config get-contexts` and k8s/README.md")
