"""jobs/submit.py --cluster k8s on a real cluster: `--wait` for jobs that end in various ways, and their removal.

The jobs are made of a copy of k8s/ with resources for a small machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.cluster import small
from tests.cluster.namespace import Namespace
from tests.conftest import Done
from tests.manifests import K8S, KUBECTL, Object

pytestmark = pytest.mark.cluster

ROOT = K8S.parent
SHORT = ["--gpus-per-node=0", "--", "--epochs=3", "--run-id=r"]
LONG = ["--gpus-per-node=0", "--", "--epochs=500", "--patience=500", "--run-id=r"]
TWO_POLLS = 12  # seconds; `--wait` asks for the state of a job every 5 s


@pytest.fixture
def checkout(namespace: Namespace, tmp_path: Path) -> Checkout:
    return Checkout(namespace, tmp_path)


class Checkout:
    """A copy of the code and of k8s/, and a kubeconfig whose context has the test's namespace."""

    def __init__(self, namespace: Namespace, folder: Path) -> None:
        self.namespace, self.folder = namespace, folder
        self.kubeconfig = Path(shutil.copy(namespace.cluster.kubeconfig, folder / "kubeconfig"))
        self.kubectl("config", "set-context", "--current", f"--namespace={namespace.name}")
        for name in ("fusion", "jobs"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copytree(K8S, folder / "k8s")
        for path in (folder / "k8s").glob("*.yaml"):
            path.write_text(yaml.safe_dump_all([_smaller(one) for one in yaml.safe_load_all(path.read_text())]))

    def kubectl(self, *arguments: str) -> None:
        subprocess.run([KUBECTL, f"--kubeconfig={self.kubeconfig}", *arguments], check=True, capture_output=True)

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.folder / "jobs" / "submit.py"), "--cluster=k8s"]
        command += [f"--image={self.namespace.cluster.image}", *flags]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("FUSION_", "AWS_"))}
        path = f"{Path(KUBECTL).parent}:{os.environ['PATH']}"
        environment = {**clean, "PATH": path, "PYTHONPATH": str(ROOT), "KUBECONFIG": str(self.kubeconfig)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT)

    def submit(self, *flags: str) -> Done:
        return ended(self.start(*flags))


def ended(process: subprocess.Popen[str], seconds: float = 400) -> Done:
    """Waits for the end of a process, and kills it on timeout; returns its result."""
    try:
        out, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return Done(process.returncode, out, "")


def _smaller(found: Object) -> Object:
    if found["kind"] in small.PODS:
        for container in small.pod_of(found)["containers"]:
            container["resources"]["requests"] |= small.REQUESTS
            container["resources"]["limits"] |= small.LIMITS
    return found


def job_of(said: str) -> str:
    """The name of the created Job in the output of submit.py."""
    found = re.search(r"job\.batch/(\S+) created", said)
    assert found, said
    return found[1]


def test_wait_ends_with_0_when_the_job_completes(checkout: Checkout) -> None:
    done = checkout.submit("--wait", "--variant=qwen_clip", *SHORT)
    assert done.code == 0, done.out
    assert done.out.endswith("is complete\n")
    predict = ["--wait", "--task=predict", "--variant=qwen_clip", "--", "--name=day"]
    for event in ("event=published ", "event=published_before"):
        done = checkout.submit(*predict)
        assert done.code == 0, done.out
        names = re.findall(r"job\.batch/(\S+) (?:created|replaced)", done.out)
        assert event in checkout.namespace.log(f"job/{names[-1]}")


def test_wait_ends_with_65_when_data_is_missing(checkout: Checkout) -> None:
    done = checkout.submit("--wait", "--variant=qwen_clip", *SHORT, "--data=s3://no-such-bucket/data")
    assert done.code == 65, done.out
    assert "PodFailurePolicy" in done.out
    assert [line.partition(":")[0] for line in done.out.splitlines()[-2:]] == ["error", "hint"]


def test_wait_keeps_its_context_and_ends_with_143_when_the_job_is_deleted(checkout: Checkout) -> None:
    namespace, process = checkout.namespace, checkout.start("--wait", "--variant=qwen_clip", *LONG)
    try:
        (job,) = namespace.until(lambda: namespace.items("jobs"), "the Job")
        checkout.kubectl("config", "set-context", "elsewhere", "--namespace=default", "--cluster=tests", "--user=admin")
        checkout.kubectl("config", "use-context", "elsewhere")
        time.sleep(TWO_POLLS)
        assert process.poll() is None
        namespace("delete", "job", job["metadata"]["name"])
    finally:
        done = ended(process, 60)
    assert (done.code, done.out.splitlines()[-1]) == (143, f"job/{job['metadata']['name']} was deleted")


def test_jobs_that_run_already_are_not_started_again(checkout: Checkout) -> None:
    namespace = checkout.namespace
    namespace("create", "quota", "none", "--hard=pods=0")
    flags = ["--variant", "qwen_clip", "all_embeddings", "--", "--lr", "1e-5"]
    done = checkout.submit(*flags)
    names = re.findall(r"job\.batch/(\S+) created", done.out)
    args = [namespace.get("jobs", name)["spec"]["template"]["spec"]["containers"][0]["args"] for name in names]
    assert [words[3:] for words in args] == [
        ["fusion.qwen_clip.train", "--lr", "1e-05"],
        ["fusion.all_embeddings.train", "--lr", "1e-05"],
    ]
    assert checkout.submit(*flags).out == "".join(f"job/{name} is running already\n" for name in names)


def test_a_job_above_the_quota_is_refused(checkout: Checkout) -> None:
    checkout.namespace("create", "quota", "none", "--hard=count/jobs.batch=0")
    done = checkout.submit("--wait", "--variant=qwen_clip", *SHORT)
    assert done.code == 78, done.out
    assert "exceeded quota" in done.out and "kubectl describe resourcequota" in done.out


def test_deleting_a_job_removes_its_service_and_network_policy(checkout: Checkout) -> None:
    namespace = checkout.namespace
    done = checkout.submit("--nodes=2", "--variant=qwen_clip", *SHORT)
    name = job_of(done.out)
    assert namespace.ended(name) == "Complete"
    assert namespace.get("services", name) and namespace.get("networkpolicies", name)
    namespace("delete", "job", name)
    namespace.until(lambda: not namespace.get("services", name), "the removal of the Service")
    namespace.until(lambda: not namespace.get("networkpolicies", name), "the removal of the NetworkPolicy")
    assert not namespace.items("pods")


@pytest.mark.parametrize("flags", [["--task=predict", "--if-changed"]])
def test_if_changed_is_refused_on_kubernetes(checkout: Checkout, flags: Sequence[str]) -> None:
    done = checkout.submit(*flags)
    assert done.code == 64
    assert "hint: " in done.out and not checkout.namespace.items("jobs")
