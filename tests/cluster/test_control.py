"""jobs/control.py on a real cluster: a training that loses a pod and is cancelled, and a job that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.namespace import LONG, Namespace
from tests.conftest import Done
from tests.manifests import K8S, KUBECTL

pytestmark = pytest.mark.cluster

ROOT = K8S.parent
ENDLESS = {**LONG, "FUSION_EPOCHS": "100000", "FUSION_PATIENCE": "100000"}  # until it is cancelled


def start(namespace: Namespace, verb: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/control.py", verb, f"--namespace={namespace.name}", *arguments]
    path = f"{Path(KUBECTL).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "KUBECONFIG": namespace.cluster.kubeconfig}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe)


def ended(process: subprocess.Popen[str]) -> Done:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def control(namespace: Namespace, verb: str, *arguments: str) -> Done:
    return ended(start(namespace, verb, *arguments))


def test_a_log_is_followed_across_a_lost_pod_until_the_job_is_cancelled(namespace: Namespace) -> None:
    name = "fusion-train-qwen-clip"
    namespace.apply("base/train-qwen-clip", {**ENDLESS, "FUSION_RUN_ID": "r"})
    follower = start(namespace, "logs", "--follow", name)
    try:
        namespace.first_checkpoint("r", name)
        (listed,) = json.loads(control(namespace, "list", "--cluster=k8s", "--json").out)
        assert (listed["id"], listed["state"]) == (f"job/{name}", "running")
        namespace("delete", "pod", namespace.pods(name)[0]["metadata"]["name"], "--wait=false")
        namespace.until(lambda: len(namespace.attempts("r")) == 2, "the next pod's attempt")
        before = namespace.checkpoints("r")  # the last of them by the first attempt, when it was asked to stop
        namespace.until(lambda: namespace.checkpoints("r")[-1:] > before[-1:], "its checkpoint")
        assert " run=r " in json.loads(control(namespace, "status", "--json", name).out)[0]["said"]
        cancelled = control(namespace, "cancel", name)
        assert cancelled.code == 0 and cancelled.out.startswith(f"job/{name} is asked to stop")
        namespace.until(lambda: not namespace.get("jobs", name), "the end of the Job")
        followed = ended(follower)
    finally:
        follower.kill()
    assert followed.code == 0, followed.err
    assert followed.out.count("event=resumed") == 1
    assert [attempt["code"] for attempt in namespace.attempts("r")] == [75, 75]
    assert control(namespace, "status", name).code == 65


def test_the_status_of_a_failed_job_has_its_code_and_error(namespace: Namespace) -> None:
    name = "fusion-evaluate-all-embeddings"
    namespace.apply("base/evaluate-all-embeddings")
    assert control(namespace, "wait", name).code == 65
    (shown,) = json.loads(control(namespace, "status", "--json", name).out)
    assert (shown["state"], shown["code"], shown["why"]) == ("failed", 65, "PodFailurePolicy")
    assert shown["said"].startswith("error: ") and "\nhint: " in shown["said"]
