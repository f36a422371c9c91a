"""A namespace for one test, set up as in k8s/README.md, and what tests do there with kubectl."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion import storage
from tests.cluster import small, store
from tests.cluster.cluster import Cluster
from tests.conftest import BUCKET
from tests.manifests import KUBECTL, Object
from tests.s3_server import WRITER_KEY, WRITER_SECRET

SETTINGS = {"FUSION_WIDTH": "16", "FUSION_HIDDEN": "16,8", "FUSION_BATCH_SIZE": "64", "FUSION_LR": "0.01"}
TIMEOUT = 300  # seconds that any condition may take; on an idle machine with 2 cores none takes 60
LABEL = "pod-security.kubernetes.io"
LONG = {
    "FUSION_EPOCHS": "100",
    "FUSION_PATIENCE": "100",
    "FUSION_CHECKPOINT_STEPS": "20",
}  # enough time to interrupt it


class Namespace:
    """Created by the constructor, with fusion-config and the Secret. `remove` deletes it with all that runs there."""

    def __init__(self, cluster: Cluster, name: str, folder: Path) -> None:
        self.cluster, self.name, self.folder = cluster, name, folder
        self.output = f"s3://{BUCKET}/{name}/{uuid.uuid4().hex[:8]}"  # a new folder for each run of the test
        self("create", "namespace", name)
        self("label", "namespace", name, f"{LABEL}/enforce=restricted", f"{LABEL}/warn=restricted")
        keys = {"AWS_ACCESS_KEY_ID": WRITER_KEY, "AWS_SECRET_ACCESS_KEY": WRITER_SECRET}
        literals = [f"--from-literal={key}={value}" for key, value in keys.items()]
        self("create", "secret", "generic", "fusion-credentials", *literals)
        self.configure()

    def configure(self, **settings: str) -> None:
        """Applies k8s/config.yaml with the bucket of this namespace, and with further settings for all its jobs."""
        data = {"FUSION_DATA": f"s3://{BUCKET}/data", "FUSION_OUTPUT": self.output, **SETTINGS, **settings}
        data["AWS_ENDPOINT_URL_S3"] = store.ENDPOINT
        patch = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "fusion-config"}, "data": data}
        further = [{"patch": json.dumps(patch)}]
        target = small.overlay(self.folder, "base/config", self.cluster.image, further=further)
        self("apply", "--server-side", "--kustomize", str(target))

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """Runs kubectl and returns its output; raises AssertionError when it fails or prints a warning."""
        done = self.run(*arguments, text=text)
        assert (done.returncode, done.stderr) == (0, ""), f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def run(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [KUBECTL, f"--kubeconfig={self.cluster.kubeconfig}", f"--namespace={self.name}", *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, input=text, timeout=180)

    def apply(self, source: str, environment: Mapping[str, str] | None = None, changes: Sequence[Object] = ()) -> None:
        """Applies base/… or overlays/… with the changes that `tests.cluster.small` describes."""
        target = small.overlay(self.folder, source, self.cluster.image, environment, changes)
        self("apply", "--server-side", "--kustomize", str(target))

    def get(self, kind: str, name: str) -> Any:
        """The object with this name; None when there is none."""
        return self.cluster.api.one(self.name, kind, name)

    def items(self, kind: str, selector: str = "") -> list[Object]:
        return self.cluster.api.items(self.name, kind, selector)

    def pods(self, job: str) -> list[Object]:
        """The existing pods of a Job, oldest first."""
        found = self.items("pods", f"batch.kubernetes.io/job-name={job}")
        return sorted(found, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def log(self, of: str) -> str:
        """The log of a Job (job/NAME) or a pod."""
        return self("logs", of, "--container=fusion", "--tail=-1")

    def until(self, holds: Callable[[], Any], what: str, seconds: float = TIMEOUT) -> Any:
        """Polls a condition until it is true; returns its value, or fails with `situation` on timeout."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < deadline, f"{what}: not in {seconds:.0f} s\n{self.situation()}"
            time.sleep(0.3)
        return found

    def ended(self, job: str, seconds: float = TIMEOUT) -> str:
        """Waits until a Job has ended; returns Complete, or the reason of its failure."""

        def ending() -> str:
            conditions = self.get("jobs", job)["status"].get("conditions", [])
            found = {one["type"]: one["reason"] for one in conditions if one["status"] == "True"}
            return "Complete" if "Complete" in found else str(found.get("Failed", ""))

        return str(self.until(ending, f"the end of job/{job}", seconds))

    def first_checkpoint(self, run: str, job: str) -> None:
        """Waits until a run has committed a checkpoint."""

        def committed() -> bool:
            return any(storage.exists(f"{url}/MANIFEST.json") for url in self.checkpoints(run))

        self.until(committed, f"a checkpoint of {run} by {job}")

    def checkpoints(self, run: str) -> list[str]:
        return list(storage.ls(f"{self.output}/runs/{run}/checkpoints"))

    def attempts(self, run: str) -> list[Object]:
        """The contents of `exit.json` of all attempts at a run, in order; empty for an attempt that was killed."""
        folder = f"{self.output}/runs/{run}/attempts"
        numbers = sorted(int(url.rstrip("/").rsplit("/", 1)[1]) for url in storage.ls(folder))
        return [self._attempt(f"{folder}/{number}") for number in numbers]

    @staticmethod
    def _attempt(url: str) -> Object:
        is_ended = storage.exists(f"{url}/exit.json")
        return json.loads(storage.read(f"{url}/exit.json")) if is_ended else {}

    def situation(self) -> str:
        """Jobs, pods, events and the last lines of logs, for the message of a failed test."""
        lines = [self.run("get", "jobs,pods", "--output=wide").stdout]
        lines += [self.run("get", "events", "--sort-by=.lastTimestamp").stdout[-3000:]]
        for pod in self.items("pods"):
            name = pod["metadata"]["name"]
            lines += [f"--- {name}", self.run("logs", name, "--tail=15").stdout]
        return "\n".join(lines)

    def remove(self) -> None:
        self.run("delete", "jobs,cronjobs,pods", "--all", "--force", "--grace-period=0", "--wait=false")
        self.run("delete", "namespace", self.name, "--wait=false")
