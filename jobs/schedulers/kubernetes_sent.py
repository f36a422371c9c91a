"""Jobs that were sent to Kubernetes, by hand or by jobs/submit.py: Jobs and JobSets with Fusion's label."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import cast

from fusion.errors import DataError, FusionError, UnreachableError, UsageError
from jobs.schedulers import kubernetes_wait
from jobs.schedulers.errors import last_error
from jobs.schedulers.kubectl import Kubectl, Object
from jobs.schedulers.kubernetes_wait import PODS, QUEUE, ending, exit_code, kind_of, last_failure, log_command, split
from jobs.schedulers.sent import ASK, CANCELLED, FAILED, FINISHED, RUNNING, WAITING, Sent

SELECTOR = "--selector=app.kubernetes.io/part-of=fusion"
JOB_UID = "kueue.x-k8s.io/job-uid"  # label of Kueue's Workloads
INDEX = "batch.kubernetes.io/job-completion-index"
JOBSETS = "jobset.x-k8s.io"
CONTAINER = "fusion"
NO_POD = "no pod yet"
PATIENCE = 300.0  # seconds for which a log that breaks off is asked for again


class KubernetesJobs:
    """Those of the namespace that kubectl is called with."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl

    def all(self, days: int) -> list[Sent]:
        has_jobsets = self._kubectl("api-resources", f"--api-group={JOBSETS}", "--output=name").strip()
        kinds = ["jobs", "pods", *(["jobsets"] if has_jobsets else [])]
        found = [one for kind in kinds for one in self._list(kind, SELECTOR)]
        pods = [one for one in found if kind_of(one) == "pod"]
        first = f"{datetime.now(UTC) - timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}"
        jobs = [one for one in found if kind_of(one) in PODS and not _is_of_jobset(one)]
        return [self._job(one, pods) for one in jobs if one["metadata"].get("creationTimestamp", first) >= first]

    def find(self, job_id: str) -> list[Sent]:
        kind, name = split(job_id)
        if kind not in PODS:
            message = f"{job_id} is no id of a job, expected job/NAME or jobset/NAME"
            raise UsageError(message, "`python jobs/control.py list` shows them")
        found = self._kubectl.get(kind, name)
        if not found:
            where = f"namespace {self._kubectl.namespace}" if self._kubectl.namespace else "this namespace"
            raise DataError(
                f"there is no {kind}/{name} in {where}", "`python jobs/control.py list` shows what is there"
            )
        pods = self._pods(kind, name)
        job = self._job(found, pods)
        why = [self._warning(name) or job.why] if job.why == NO_POD else [job.why, self._of_kueue(found)]
        return [replace(job, why=": ".join(filter(None, why)), said=self._said(job, pods))]

    def log(self, job: Sent, *, node: int, follow: bool) -> Iterator[str]:
        kind, name = split(job.id)
        shown: set[str] = set()
        while True:
            found = self._kubectl.get(kind, name)
            started = [pod for pod in self._pods(kind, name) if _index(pod) == node and _state(pod)]
            new = [pod for pod in started if _uid(pod) not in shown]
            for pod in new if shown else new[-1:]:
                yield from self._lines(pod, follow)
            shown |= set(map(_uid, new))
            if not follow or not found or ending(found):
                break
            time.sleep(ASK)
        if not shown:
            raise UnreachableError(f"{job.id} has no log yet ({job.why})", "ask again, or wait for it with --follow")

    def cancel(self, job: Sent) -> None:
        # Foreground: it stays in lists until its pods have committed and are gone.
        self._kubectl("delete", *split(job.id), "--wait=false", "--cascade=foreground")

    def wait(self, jobs: Sequence[Sent]) -> int:
        return kubernetes_wait.wait([job.id for job in jobs], self._kubectl)

    def _list(self, kind: str, selector: str) -> list[Object]:
        found = self._kubectl.get(kind, selector) or {"items": []}
        singular = kind.removesuffix("s")
        return [{"kind": singular, **one} for one in cast(list[Object], found["items"])]  # older servers leave it out

    def _pods(self, kind: str, name: str) -> list[Object]:
        """The oldest first."""
        found = self._list("pods", f"--selector={PODS[kind]}={name}")
        return sorted(found, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))

    def _job(self, found: Object, pods: Sequence[Object]) -> Sent:
        kind, metadata = kind_of(found), found["metadata"]
        own = [pod for pod in pods if pod["metadata"].get("labels", {}).get(PODS[kind]) == metadata["name"]]
        state, why, code = _standing(found, own)
        condition, status = ending(found) or {}, found.get("status", {})
        started = min((pod["status"]["startTime"] for pod in own if pod["status"].get("startTime")), default="")
        return Sent(
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
        """What the controller warned of last, such as a quota or a missing ServiceAccount; empty when of nothing."""
        found = self._list("events", f"--field-selector=involvedObject.name={name},type=Warning")
        last = max(found, key=lambda one: one.get("lastTimestamp") or "", default={})
        return ": ".join(filter(None, (last.get("reason"), last.get("message"))))

    def _of_kueue(self, job: Object) -> str:
        """Why Kueue has not admitted it; empty where Kueue has nothing to do with it."""
        if QUEUE not in job["metadata"].get("labels", {}) or not job["spec"].get("suspend"):
            return ""
        try:
            found = self._list("workloads", f"--selector={JOB_UID}={job['metadata']['uid']}")
        except FusionError:  # a user may look at jobs alone
            return ""
        conditions = [one for workload in found for one in workload.get("status", {}).get("conditions", [])]
        return next((one.get("message", "") for one in conditions if one["type"] == "QuotaReserved"), "")

    def _said(self, job: Sent, pods: Sequence[Object]) -> str:
        failure = last_failure(pods)
        if job.state == FAILED and (error := last_error(failure.get("message", "")) or failure.get("reason", "")):
            return cast(str, error)
        started = [pod for pod in pods if _state(pod)]
        try:
            return "".join(self._log(started[-1], "--tail=1")) if started else ""
        except FusionError:  # its node may be gone, which is no reason to say nothing of the job
            return ""

    def _lines(self, pod: Object, follow: bool) -> Iterator[str]:
        """The log of a pod; one that breaks off although the pod runs goes on where it ended."""
        since, deadline = "", time.monotonic() + PATIENCE
        while True:
            flags = ["--timestamps", *(["--follow"] if follow else []), *([f"--since-time={since}"] if since else [])]
            last = since
            try:
                for line in self._log(pod, *flags):
                    stamp, _, text = line.partition(" ")
                    if stamp > last or not last:  # of an equal moment all but those before the break
                        yield text
                    since, deadline = stamp, time.monotonic() + PATIENCE
            except FusionError:
                if not follow or (self._is_there(pod) and time.monotonic() > deadline):
                    raise
            if not follow or not self._is_there(pod, running=True):
                break
            time.sleep(ASK)

    def _log(self, pod: Object, *flags: str) -> Iterator[str]:
        return self._kubectl.lines("logs", pod["metadata"]["name"], f"--container={CONTAINER}", *flags)

    def _is_there(self, pod: Object, running: bool = False) -> bool:
        found = self._kubectl.get("pod", pod["metadata"]["name"])
        if found is None or _uid(found) != _uid(pod):
            return False
        return not running or "running" in _state(found)


def _standing(job: Object, pods: Sequence[Object]) -> tuple[str, str, int | None]:
    """State of a Job or JobSet, why, and its exit code once it has ended."""
    condition = ending(job)
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
    return WAITING, next(filter(None, map(_hindrance, reversed(pods))), NO_POD), None


def _hindrance(pod: Object) -> str:
    """Why a pod does not run; empty where nothing says so."""
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
    """That of its container: running or terminated; empty where it has not started."""
    states = [one.get("state", {}) for one in _statuses(pod) if one["name"] == CONTAINER]
    return next((state for state in states if "waiting" not in state), {})


def _index(pod: Object) -> int:
    """Which of the nodes of a job it is."""
    return int(pod["metadata"].get("labels", {}).get(INDEX, 0))


def _uid(pod: Object) -> str:
    return cast(str, pod["metadata"]["uid"])


def _is_of_jobset(job: Object) -> bool:
    return any(owner["kind"] == "JobSet" for owner in job["metadata"].get("ownerReferences", []))
