"""A namespace of one test, as k8s/README.md has it made, and what the test does there with kubectl."""

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
from tests.cluster.place import Place
from tests.conftest import BUCKET
from tests.manifests import KUBECTL, Object
from tests.s3_server import WRITER_KEY, WRITER_SECRET

SETTINGS = {"FUSION_WIDTH": "16", "FUSION_HIDDEN": "16,8", "FUSION_BATCH_SIZE": "64", "FUSION_LR": "0.01"}
PATIENCE = 300  # seconds; on an idle machine of 2 cores nothing takes 60
LABEL = "pod-security.kubernetes.io"
LONG = {"FUSION_EPOCHS": "100", "FUSION_PATIENCE": "100", "FUSION_CHECKPOINT_STEPS": "20"}  # to be interrupted


class Namespace:
    """Starts on construction, with fusion-config and the Secret; `remove` deletes it with all that runs there."""

    def __init__(self, place: Place, name: str, folder: Path) -> None:
        self.place, self.name, self.folder = place, name, folder
        self.output = f"s3://{BUCKET}/{name}/{uuid.uuid4().hex[:8]}"  # empty, also where the test ran before
        self("create", "namespace", name)
        self("label", "namespace", name, f"{LABEL}/enforce=restricted", f"{LABEL}/warn=restricted")
        keys = {"AWS_ACCESS_KEY_ID": WRITER_KEY, "AWS_SECRET_ACCESS_KEY": WRITER_SECRET}
        literals = [f"--from-literal={key}={value}" for key, value in keys.items()]
        self("create", "secret", "generic", "fusion-credentials", *literals)
        self.configure()

    def configure(self, **settings: str) -> None:
        """Applies k8s/config.yaml with the bucket of this namespace, and further settings of all its jobs."""
        data = {"FUSION_DATA": f"s3://{BUCKET}/data", "FUSION_OUTPUT": self.output, **SETTINGS, **settings}
        data["AWS_ENDPOINT_URL_S3"] = store.ENDPOINT
        patch = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "fusion-config"}, "data": data}
        further = [{"patch": json.dumps(patch)}]
        target = small.overlay(self.folder, "base/config", self.place.image, further=further)
        self("apply", "--server-side", "--kustomize", str(target))

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """What kubectl prints; an AssertionError with its complaint where it fails, or warns."""
        done = self.run(*arguments, text=text)
        assert (done.returncode, done.stderr) == (0, ""), f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def run(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [KUBECTL, f"--kubeconfig={self.place.kubeconfig}", f"--namespace={self.name}", *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, input=text, timeout=180)

    def apply(self, source: str, environment: Mapping[str, str] | None = None, changes: Sequence[Object] = ()) -> None:
        """Applies base/… or overlays/… as it is but for `small`."""
        target = small.overlay(self.folder, source, self.place.image, environment, changes)
        self("apply", "--server-side", "--kustomize", str(target))

    def get(self, kind: str, name: str) -> Any:
        """An object; None where there is none."""
        return self.place.api.one(self.name, kind, name)

    def items(self, kind: str, selector: str = "") -> list[Object]:
        return self.place.api.items(self.name, kind, selector)

    def pods(self, job: str) -> list[Object]:
        """Pods of a Job that are still there, the oldest first."""
        found = self.items("pods", f"batch.kubernetes.io/job-name={job}")
        return sorted(found, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def log(self, of: str) -> str:
        """What the command of a Job or a pod has said."""
        return self("logs", of, "--container=fusion", "--tail=-1")

    def until(self, holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """What a condition gives once it is true; an AssertionError with what is going on here when it never is."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < deadline, f"{what}: not in {seconds:.0f} s\n{self.situation()}"
            time.sleep(0.3)
        return found

    def ended(self, job: str, seconds: float = PATIENCE) -> str:
        """Complete, or the reason of a failure, once a Job has ended."""

        def ending() -> str:
            conditions = self.get("jobs", job)["status"].get("conditions", [])
            found = {one["type"]: one["reason"] for one in conditions if one["status"] == "True"}
            return "Complete" if "Complete" in found else str(found.get("Failed", ""))

        return str(self.until(ending, f"the end of job/{job}", seconds))

    def first_checkpoint(self, run: str, job: str) -> None:
        """Returns when a run has committed a checkpoint."""

        def committed() -> bool:
            return any(storage.exists(f"{url}/MANIFEST.json") for url in self.checkpoints(run))

        self.until(committed, f"a checkpoint of {run} by {job}")

    def checkpoints(self, run: str) -> list[str]:
        return list(storage.ls(f"{self.output}/runs/{run}/checkpoints"))

    def attempts(self, run: str) -> list[Object]:
        """`exit.json` of the attempts at a run, in their order; empty where one could not write it."""
        folder = f"{self.output}/runs/{run}/attempts"
        numbers = sorted(int(url.rstrip("/").rsplit("/", 1)[1]) for url in storage.ls(folder))
        return [self._attempt(f"{folder}/{number}") for number in numbers]

    @staticmethod
    def _attempt(url: str) -> Object:
        is_ended = storage.exists(f"{url}/exit.json")
        return json.loads(storage.read(f"{url}/exit.json")) if is_ended else {}

    def situation(self) -> str:
        """Events, pods and the ends of their logs, for a test that has failed."""
        told = [self.run("get", "jobs,pods", "--output=wide").stdout]
        told += [self.run("get", "events", "--sort-by=.lastTimestamp").stdout[-3000:]]
        for pod in self.items("pods"):
            name = pod["metadata"]["name"]
            told += [f"--- {name}", self.run("logs", name, "--tail=15").stdout]
        return "\n".join(told)

    def remove(self) -> None:
        self.run("delete", "jobs,cronjobs,pods", "--all", "--force", "--grace-period=0", "--wait=false")
        self.run("delete", "namespace", self.name, "--wait=false")
