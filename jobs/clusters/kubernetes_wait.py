"""Follows Jobs of Kubernetes to their end, and tells how they ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from functools import partial

from fusion.errors import ExitCode, FusionError, visible
from jobs.clusters.errors import last_error
from jobs.clusters.kubectl import Kubectl, Object
from jobs.clusters.patience import patiently

POLL = 5.0  # seconds between two looks at a job
PATIENCE = 300.0  # seconds without an answer of the cluster after which a wait ends; an upgrade of its API takes less
STOPPED = 128 + signal.SIGTERM
# Jobs that Kubernetes ended: their pods got SIGTERM and are gone, and with them their exit codes.
ENDED_BY_KUBERNETES = {"DeadlineExceeded": STOPPED}
QUEUE = "kueue.x-k8s.io/queue-name"


def wait(names: Sequence[str], kubectl: Kubectl) -> int:
    """Exit code of the first of these Jobs that failed, and 0 when there is none; tells why it did.

    Raises:
        FusionError: the cluster did not answer for too long, or not to this user any more.
    """
    codes = [_wait(name, kubectl) for name in names]
    return next((code for code in codes if code), 0)


def ending(job: Object) -> Object | None:
    """The condition of a Job that has ended; None while it has not."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((one for one in conditions if one["type"] in ("Complete", "Failed") and one["status"] == "True"), None)


def standing(job: Object, kubectl: Kubectl) -> str:
    """How a Job that has not ended is: running, or suspended and what to do about it."""
    name, labels = job["metadata"]["name"], job["metadata"].get("labels", {})
    if not job["spec"].get("suspend"):
        return f"job/{name} is running already"
    if QUEUE in labels:
        return f"job/{name} waits in Kueue's queue {labels[QUEUE]}"
    remedy = f'{kubectl.command} patch job {name} --patch \'{{"spec": {{"suspend": false}}}}\''
    return f"job/{name} is suspended\nhint: to let it go on: {remedy}"


def _wait(name: str, kubectl: Kubectl) -> int:
    was_suspended = False
    while job := _ask(kubectl, "job", name):
        if condition := ending(job):
            return _conclude(name, condition, kubectl)
        is_suspended = bool(job["spec"].get("suspend"))
        if is_suspended and not was_suspended:
            print(standing(job, kubectl), flush=True)
        was_suspended = is_suspended
        time.sleep(POLL)
    print(f"job/{name} was deleted", flush=True)
    return STOPPED


def _conclude(name: str, condition: Object, kubectl: Kubectl) -> int:
    if condition["type"] == "Complete":
        print(f"job/{name} is complete", flush=True)
        return ExitCode.DONE
    try:
        ended = _last_failure(name, kubectl)
    except FusionError as error:  # that the job has failed is known, and worth more than why
        print(f"how its pods ended is not known: {error.message}", flush=True)
        ended = {}
    reason = condition.get("reason", "")
    code = ENDED_BY_KUBERNETES.get(reason) or int(ended.get("exitCode", 1))
    why = ": ".join(filter(None, (reason, condition.get("message"))))
    print(visible(f"job/{name} failed with exit code {code}: {why}"), flush=True)
    if said := last_error(ended.get("message", "")) or ended.get("reason"):
        print(said, flush=True)
    return code


def _last_failure(name: str, kubectl: Kubectl) -> Object:
    """The terminated state of the container that failed last: exitCode, message, reason."""
    pods = _ask(kubectl, "pods", f"--selector=batch.kubernetes.io/job-name={name}") or {"items": []}
    statuses = [status for pod in pods["items"] for status in pod["status"].get("containerStatuses", [])]
    ended = [status["state"]["terminated"] for status in statuses if "terminated" in status["state"]]
    return max((one for one in ended if one["exitCode"]), key=lambda one: one["finishedAt"], default={})


def _ask(kubectl: Kubectl, *what: str) -> Object | None:
    """Asked again whatever went wrong: what is there was sent from here, so that nothing is wrong with the question."""
    return patiently(partial(kubectl.get, *what), PATIENCE, POLL)
