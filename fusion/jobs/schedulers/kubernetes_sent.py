"""Lists and controls the Jobs and JobSets of Kubernetes that have Fusion's label, no matter who created them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import cast

from fusion.errors import DataError, FusionError, UnreachableError, UsageError
from fusion.jobs.schedulers import kubernetes_wait
from fusion.jobs.schedulers.errors import last_error
from fusion.jobs.schedulers.kubectl import Kubectl, Object
from fusion.jobs.schedulers.kubernetes_wait import (
    PODS,
    QUEUE,
    exit_code,
    final_condition,
    kind_of,
    last_failure,
    log_command,
    split_id,
)
from fusion.jobs.schedulers.sent import CANCELLED, FAILED, FINISHED, POLL_STATE, RUNNING, WAITING, SentJob

SELECTOR = "--selector=app.kubernetes.io/part-of=fusion"
JOB_UID = "kueue.x-k8s.io/job-uid"  # label of Kueue's Workloads: the uid of the Job that one belongs to
INDEX = "batch.kubernetes.io/job-completion-index"  # label of a pod: its node's number
JOBSETS = "jobset.x-k8s.io"  # API group
CONTAINER = "fusion"
NO_POD = "no pod yet"
RETRY_SECONDS = 300.0  # how long to reconnect to a log that breaks off; an upgrade of the API server takes less


class KubernetesJobs:
    """The jobs in the namespace of a `Kubectl`; for the methods see `Jobs`."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl

    def all(self, days: int) -> list[SentJob]:
        has_jobsets = self._kubectl("api-resources", f"--api-group={JOBSETS}", "--output=name").strip()
        kinds = ["jobs", "pods", *(["jobsets"] if has_jobsets else [])]
        found = [one for kind in kinds for one in self._list(kind, SELECTOR)]
        pods = [one for one in found if kind_of(one) == "pod"]
        first = f"{datetime.now(UTC) - timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}"
        jobs = [one for one in found if kind_of(one) in PODS and not _is_of_jobset(one)]
        return [self._job(one, pods) for one in jobs if one["metadata"].get("creationTimestamp", first) >= first]

    def find(self, job_id: str) -> list[SentJob]:
        kind, name = split_id(job_id)
        if kind not in PODS:
            message = f"{job_id} is not the id of a job, expected job/NAME or jobset/NAME"
            raise UsageError(message, "`python jobs/control.py list` shows the ids")
        found = self._kubectl.get(kind, name)
        if not found:
            where = f"namespace {self._kubectl.namespace}" if self._kubectl.namespace else "this namespace"
            raise DataError(f"there is no {kind}/{name} in {where}", "`python jobs/control.py list` shows the jobs")
        pods = self._pods(kind, name)
        job = self._job(found, pods)
        if job.why == NO_POD:
            why = self._warning(name) or job.why
        else:
            why = ": ".join(filter(None, (job.why, self._of_kueue(found))))
        return [replace(job, why=why, said=self._said(job, pods))]

    def log(self, job: SentJob, *, node: int, follow: bool) -> Iterator[str]:
        kind, name = split_id(job.id)
        shown: set[str] = set()
        while True:
            found = self._kubectl.get(kind, name)
            started = [pod for pod in self._pods(kind, name) if _index(pod) == node and _state(pod)]
            new = [pod for pod in started if _uid(pod) not in shown]
            # Of the pods that had started before this call, only the newest one's log is shown.
            for pod in new if shown else new[-1:]:
                yield from self._lines(pod, follow)
            shown |= set(map(_uid, new))
            if not follow or not found or final_condition(found):
                break
            time.sleep(POLL_STATE)
        if not shown:
            raise UnreachableError(f"{job.id} has no log yet ({job.why})", "try again later, or add --follow to wait")

    def cancel(self, job: SentJob) -> None:
        # With foreground deletion the job stays in lists until its pods have committed their checkpoint and ended.
        self._kubectl("delete", *split_id(job.id), "--wait=false", "--cascade=foreground")

    def wait(self, jobs: Sequence[SentJob]) -> int:
        return kubernetes_wait.wait([job.id for job in jobs], self._kubectl)

    def _list(self, kind: str, selector: str) -> list[Object]:
        """The objects of a kind, in the plural, that match a selector."""
        found = self._kubectl.get(kind, selector) or {"items": []}
        singular = kind.removesuffix("s")
        # Some API servers omit `kind` in the items of a list.
        return [{"kind": singular, **one} for one in cast(list[Object], found["items"])]

    def _pods(self, kind: str, name: str) -> list[Object]:
        """The pods of a Job or JobSet, oldest first."""
        found = self._list("pods", f"--selector={PODS[kind]}={name}")
        return sorted(found, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))

    def _job(self, found: Object, pods: Sequence[Object]) -> SentJob:
        kind, metadata = kind_of(found), found["metadata"]
        own = [pod for pod in pods if pod["metadata"].get("labels", {}).get(PODS[kind]) == metadata["name"]]
        state, why, code = _state_of(found, own)
        condition, status = final_condition(found) or {}, found.get("status", {})
        started = min((pod["status"]["startTime"] for pod in own if pod["status"].get("startTime")), default="")
        return SentJob(
            f"{kind}/{metadata['name']}",
            metadata["name"],
            state,
            why,
            code,
            metadata.get("creationTimestamp", ""),
            status.get("startTime") or started,
            condition.get("lastTransitionTime", ""),
            log_command(kind, metadata["name"], self._kubectl),
        )

    def _warning(self, name: str) -> str:
        """The newest warning event of the job, such as an exceeded quota; empty when there is none."""
        found = self._list("events", f"--field-selector=involvedObject.name={name},type=Warning")
        last = max(found, key=lambda one: one.get("lastTimestamp") or "", default={})
        return ": ".join(filter(None, (last.get("reason"), last.get("message"))))

    def _of_kueue(self, job: Object) -> str:
        """Why Kueue has not admitted the job; empty for a job that is not suspended by Kueue."""
        if QUEUE not in job["metadata"].get("labels", {}) or not job["spec"].get("suspend"):
            return ""
        try:
            found = self._list("workloads", f"--selector={JOB_UID}={job['metadata']['uid']}")
        except FusionError:  # The user may lack the permission to list Workloads.
            return ""
        conditions = [one for workload in found for one in workload.get("status", {}).get("conditions", [])]
        return next((one.get("message", "") for one in conditions if one["type"] == "QuotaReserved"), "")

    def _said(self, job: SentJob, pods: Sequence[Object]) -> str:
        """For a failed job its error, for others the last line of the log; empty when neither is available."""
        failure = last_failure(pods)
        if job.state == FAILED and (error := last_error(failure.get("message", "")) or failure.get("reason", "")):
            return cast(str, error)
        started = [pod for pod in pods if _state(pod)]
        try:
            return "".join(self._log(started[-1], "--tail=1")) if started else ""
        except FusionError:  # Its node may be gone; all else about the job is still known.
            return ""

    def _lines(self, pod: Object, follow: bool) -> Iterator[str]:
        """Yields the log of a pod. A log that breaks off while the pod runs is continued after the last line."""
        since, deadline = "", time.monotonic() + RETRY_SECONDS
        while True:
            flags = ["--timestamps"]
            if follow:
                flags.append("--follow")
            if since:
                flags.append(f"--since-time={since}")
            last = since
            try:
                for line in self._log(pod, *flags):
                    stamp, _, text = line.partition(" ")
                    # After a break, --since-time returns the last line once more.
                    if stamp > last or not last:
                        yield text
                    since, deadline = stamp, time.monotonic() + RETRY_SECONDS
            except FusionError:
                if not follow or (self._is_there(pod) and time.monotonic() > deadline):
                    raise
            if not follow or not self._is_there(pod, running=True):
                break
            time.sleep(POLL_STATE)

    def _log(self, pod: Object, *flags: str) -> Iterator[str]:
        return self._kubectl.output_lines("logs", pod["metadata"]["name"], f"--container={CONTAINER}", *flags)

    def _is_there(self, pod: Object, running: bool = False) -> bool:
        """Whether the pod still exists, and with `running`, whether its container is running."""
        found = self._kubectl.get("pod", pod["metadata"]["name"])
        if found is None or _uid(found) != _uid(pod):
            return False
        return not running or "running" in _state(found)


def _state_of(job: Object, pods: Sequence[Object]) -> tuple[str, str, int | None]:
    """State of a Job or JobSet, the reason for it, and the exit code once it has ended.

    Args:
        pods: all pods of the job, oldest first.
    """
    condition = final_condition(job)
    if condition and condition["type"] != "Failed":
        return FINISHED, "", 0
    if condition:
        return FAILED, condition.get("reason", ""), exit_code(condition, last_failure(pods))
    if job["metadata"].get("deletionTimestamp"):
        return CANCELLED, "its pods are ending", None
    if job["spec"].get("suspend"):
        queue = job["metadata"].get("labels", {}).get(QUEUE)
        return WAITING, f"in Kueue's queue {queue}" if queue else "suspended", None
    nodes = [pod["spec"].get("nodeName", "") for pod in pods if "running" in _state(pod)]
    if nodes:
        before = [pod for pod in pods if "terminated" in _state(pod)]
        return RUNNING, f"on {', '.join(nodes)}" + (f", {len(before)} pods ended before" if before else ""), None
    return WAITING, next(filter(None, map(_waiting_reason, reversed(pods))), NO_POD), None


def _waiting_reason(pod: Object) -> str:
    """Why a pod does not run, such as Unschedulable or ImagePullBackOff; empty when its status has no reason."""
    status = pod.get("status", {})
    waiting = [one["state"]["waiting"] for one in _statuses(pod) if "waiting" in one.get("state", {})]
    conditions = [one for one in status.get("conditions", []) if one.get("status") == "False"]
    unscheduled = [one for one in conditions if one["type"] == "PodScheduled"]
    found: Object = next(iter([*unscheduled, *waiting]), {})
    return ": ".join(filter(None, (found.get("reason"), found.get("message"))))


def _statuses(pod: Object) -> list[Object]:
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _state(pod: Object) -> Object:
    """The state of the pod's container: {"running": …} or {"terminated": …}; empty before it has started."""
    states = [one.get("state", {}) for one in _statuses(pod) if one["name"] == CONTAINER]
    return next((state for state in states if "waiting" not in state), {})


def _index(pod: Object) -> int:
    """The number of the pod's node within the job."""
    return int(pod["metadata"].get("labels", {}).get(INDEX, 0))


def _uid(pod: Object) -> str:
    return cast(str, pod["metadata"]["uid"])


def _is_of_jobset(job: Object) -> bool:
    return any(owner["kind"] == "JobSet" for owner in job["metadata"].get("ownerReferences", []))
