"""Waits for Jobs and JobSets of Kubernetes, and reports how they ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from functools import partial

from fusion.errors import ExitCode, FusionError
from fusion.jobs.schedulers.errors import last_error
from fusion.jobs.schedulers.kubectl import Kubectl, Object
from fusion.jobs.schedulers.patience import retry
from fusion.terminal.escapes import visible

POLL = 5.0  # seconds between two requests for the state of a job
# Seconds for which a cluster that does not answer is asked again before the wait ends with an error. An upgrade of the
# API server takes less.
RETRY_SECONDS = 300.0
STOPPED = 128 + signal.SIGTERM
# Reasons of jobs that Kubernetes ended. It deletes their pods after SIGTERM, and with them the exit codes.
ENDED_BY_KUBERNETES = {"DeadlineExceeded": STOPPED}
QUEUE = "kueue.x-k8s.io/queue-name"
OVER = ("Complete", "Completed", "Failed")  # types of the condition that a Job or JobSet ends with
PODS = {"job": "batch.kubernetes.io/job-name", "jobset": "jobset.sigs.k8s.io/jobset-name"}  # label of the pods, by kind


def wait(names: Sequence[str], kubectl: Kubectl) -> int:
    """Waits until all jobs have ended; returns the exit code of the first that failed, or 0. Prints why jobs failed.

    Args:
        names: names of Jobs, and `jobset/NAME` for JobSets.

    Raises:
        FusionError: for `RETRY_SECONDS` the cluster did not answer, or denied access to this user.
    """
    codes = [_wait(name, kubectl) for name in names]
    return next((code for code in codes if code), 0)


def final_condition(job: Object) -> Object | None:
    """The condition of a Job or JobSet that has ended; None while it has not."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((one for one in conditions if one["type"] in OVER and one["status"] == "True"), None)


def describe_unfinished(job: Object, kubectl: Kubectl) -> str:
    """Says that a job that has not ended is running, in a queue, or suspended, with the command that resumes it."""
    kind, name, labels = kind_of(job), job["metadata"]["name"], job["metadata"].get("labels", {})
    if not job["spec"].get("suspend"):
        return f"{kind}/{name} is running already"
    if QUEUE in labels:
        return f"{kind}/{name} waits in Kueue's queue {labels[QUEUE]}"
    merge = "" if kind == "job" else "--type=merge "  # kubectl's default, a strategic merge, is for built-in kinds only
    remedy = f'{kubectl.command} patch {kind} {name} {merge}--patch \'{{"spec": {{"suspend": false}}}}\''
    return f"{kind}/{name} is suspended\nhint: to resume it: {remedy}"


def kind_of(job: Object) -> str:
    """The kind of an object as kubectl spells it: job, jobset, pod."""
    return str(job.get("kind", "Job")).lower()


def log_command(kind: str, name: str, kubectl: Kubectl) -> str:
    """The command that shows the log of a Job or JobSet."""
    which = f"job/{name}" if kind == "job" else f"--selector={PODS[kind]}={name}"
    return f"{kubectl.command} logs --follow {which}"


def split_id(name: str) -> tuple[str, str]:
    """Splits `jobset/NAME` or `job/NAME` into kind and name; a name without a kind is that of a Job."""
    kind, _, alone = name.rpartition("/")
    return kind or "job", alone


def _wait(name: str, kubectl: Kubectl) -> int:
    """Waits for one job; returns its exit code."""
    was_suspended = False
    kind, name = split_id(name)
    while job := _ask(kubectl, kind, name):
        if condition := final_condition(job):
            return _report_end(kind, name, condition, kubectl)
        is_suspended = bool(job["spec"].get("suspend"))
        if is_suspended and not was_suspended:
            print(describe_unfinished(job, kubectl), flush=True)
        was_suspended = is_suspended
        time.sleep(POLL)
    print(f"{kind}/{name} was deleted", flush=True)
    return STOPPED


def _report_end(kind: str, name: str, condition: Object, kubectl: Kubectl) -> int:
    if condition["type"] != "Failed":
        print(f"{kind}/{name} is complete", flush=True)
        return ExitCode.DONE
    try:
        pods = _ask(kubectl, "pods", f"--selector={PODS[kind]}={name}") or {"items": []}
        ended = last_failure(pods["items"])
    except FusionError as error:  # The failure is reported even if its cause cannot be found out.
        print(f"how its pods ended is not known: {error.message}", flush=True)
        ended = {}
    code = exit_code(condition, ended)
    why = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
    print(visible(f"{kind}/{name} failed with exit code {code}: {why}"), flush=True)
    if said := last_error(ended.get("message", "")) or ended.get("reason"):
        print(said, flush=True)
    return code


def exit_code(condition: Object, ended: Object) -> int:
    """The exit code of a job that failed; 1 when its pods are gone.

    Args:
        condition: its condition of type Failed.
        ended: the state that `last_failure` found.
    """
    return ENDED_BY_KUBERNETES.get(condition.get("reason", "")) or int(ended.get("exitCode", 1))


def last_failure(pods: Sequence[Object]) -> Object:
    """The state of the container that failed last, with exitCode, message and reason; empty when none failed."""
    statuses = [status for pod in pods for status in pod["status"].get("containerStatuses", [])]
    ended = [status["state"]["terminated"] for status in statuses if "terminated" in status["state"]]
    return max((one for one in ended if one["exitCode"]), key=lambda one: one["finishedAt"], default={})


def _ask(kubectl: Kubectl, *what: str) -> Object | None:
    """`kubectl get`, repeated after any error: this command created the object, so the request itself is valid."""
    return retry(partial(kubectl.get, *what), RETRY_SECONDS, POLL)
