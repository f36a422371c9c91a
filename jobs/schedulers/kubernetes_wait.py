"""Follows Jobs of Kubernetes to their end, and tells how they ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from functools import partial

from fusion.errors import ExitCode, FusionError, visible
from jobs.schedulers.errors import last_error
from jobs.schedulers.kubectl import Kubectl, Object
from jobs.schedulers.patience import patiently

POLL = 5.0  # seconds between two looks at a job
PATIENCE = 300.0  # seconds without an answer of the cluster after which a wait ends; an upgrade of its API takes less
STOPPED = 128 + signal.SIGTERM
# Jobs that Kubernetes ended: their pods got SIGTERM and are gone, and with them their exit codes.
ENDED_BY_KUBERNETES = {"DeadlineExceeded": STOPPED}
QUEUE = "kueue.x-k8s.io/queue-name"
OVER = ("Complete", "Completed", "Failed")  # types of conditions that a Job or JobSet ends with
PODS = {"job": "batch.kubernetes.io/job-name", "jobset": "jobset.sigs.k8s.io/jobset-name"}  # their label


def wait(names: Sequence[str], kubectl: Kubectl) -> int:
    """Exit code of the first of these Jobs that failed, and 0 when there is none; tells why it did.

    Args:
        names: of Jobs, and `jobset/NAME` of JobSets.

    Raises:
        FusionError: the cluster did not answer for too long, or not to this user any more.
    """
    codes = [_wait(name, kubectl) for name in names]
    return next((code for code in codes if code), 0)


def ending(job: Object) -> Object | None:
    """The condition of a Job or JobSet that has ended; None while it has not."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((one for one in conditions if one["type"] in OVER and one["status"] == "True"), None)


def standing(job: Object, kubectl: Kubectl) -> str:
    """How a Job that has not ended is: running, or suspended and what to do about it."""
    kind, name, labels = kind_of(job), job["metadata"]["name"], job["metadata"].get("labels", {})
    if not job["spec"].get("suspend"):
        return f"{kind}/{name} is running already"
    if QUEUE in labels:
        return f"{kind}/{name} waits in Kueue's queue {labels[QUEUE]}"
    merge = "" if kind == "job" else "--type=merge "  # kubectl knows the lists of its own kinds alone
    remedy = f'{kubectl.command} patch {kind} {name} {merge}--patch \'{{"spec": {{"suspend": false}}}}\''
    return f"{kind}/{name} is suspended\nhint: to let it go on: {remedy}"


def kind_of(job: Object) -> str:
    """As kubectl spells it."""
    return str(job.get("kind", "Job")).lower()


def log_command(kind: str, name: str, kubectl: Kubectl) -> str:
    """What shows the log of a Job or JobSet."""
    which = f"job/{name}" if kind == "job" else f"--selector={PODS[kind]}={name}"
    return f"{kubectl.command} logs --follow {which}"


def split(name: str) -> tuple[str, str]:
    """Kind and name of `jobset/NAME` and `job/NAME`; a name alone is that of a Job."""
    kind, _, alone = name.rpartition("/")
    return kind or "job", alone


def _wait(name: str, kubectl: Kubectl) -> int:
    was_suspended = False
    kind, name = split(name)
    while job := _ask(kubectl, kind, name):
        if condition := ending(job):
            return _conclude(kind, name, condition, kubectl)
        is_suspended = bool(job["spec"].get("suspend"))
        if is_suspended and not was_suspended:
            print(standing(job, kubectl), flush=True)
        was_suspended = is_suspended
        time.sleep(POLL)
    print(f"{kind}/{name} was deleted", flush=True)
    return STOPPED


def _conclude(kind: str, name: str, condition: Object, kubectl: Kubectl) -> int:
    if condition["type"] != "Failed":
        print(f"{kind}/{name} is complete", flush=True)
        return ExitCode.DONE
    try:
        pods = _ask(kubectl, "pods", f"--selector={PODS[kind]}={name}") or {"items": []}
        ended = last_failure(pods["items"])
    except FusionError as error:  # that the job has failed is known, and worth more than why
        print(f"how its pods ended is not known: {error.message}", flush=True)
        ended = {}
    code = exit_code(condition, ended)
    why = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
    print(visible(f"{kind}/{name} failed with exit code {code}: {why}"), flush=True)
    if said := last_error(ended.get("message", "")) or ended.get("reason"):
        print(said, flush=True)
    return code


def exit_code(condition: Object, ended: Object) -> int:
    """Of a Job that failed, from its condition and the last failure of its pods."""
    return ENDED_BY_KUBERNETES.get(condition.get("reason", "")) or int(ended.get("exitCode", 1))


def last_failure(pods: Sequence[Object]) -> Object:
    """The terminated state of the container that failed last: exitCode, message, reason; empty when there is none."""
    statuses = [status for pod in pods for status in pod["status"].get("containerStatuses", [])]
    ended = [status["state"]["terminated"] for status in statuses if "terminated" in status["state"]]
    return max((one for one in ended if one["exitCode"]), key=lambda one: one["finishedAt"], default={})


def _ask(kubectl: Kubectl, *what: str) -> Object | None:
    """Asked again whatever went wrong: what is there was sent from here, so that nothing is wrong with the question."""
    return patiently(partial(kubectl.get, *what), PATIENCE, POLL)
