"""What a platform engineer types, with a real kubectl against an API server: `pytest tests/test_manifests_apply.py`.

The server stores objects and runs nothing. It has no schemas, so that kubectl is told not to ask for them.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import manifests
from tests.kubernetes_api import KubernetesApi
from tests.manifests import FILES, K8S, OVERLAYS

README = (K8S / "README.md").read_text()


class Cluster:
    """kubectl as users have it, in the namespace `fusion` of a server of its own."""

    def __init__(self, folder: Path) -> None:
        self.api = KubernetesApi(folder)
        self._flags = ["--kubeconfig", str(self.api.kubeconfig), "--cache-dir", str(folder / "cache")]

    def kubectl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return manifests.kubectl(*self._flags, *arguments)

    def lines(self, *arguments: str) -> list[str]:
        done = self.kubectl(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.splitlines()

    def apply(self, flag: str, path: Path) -> list[str]:
        return self.lines("apply", "--validate=false", flag, str(path))

    def stored(self, line: str) -> object:
        """The object that a line of kubectl speaks of."""
        return json.loads("\n".join(self.lines("get", line.split()[0], "-o", "json")))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.api.stop()


APPLIED = [pytest.param("-f", path, id=path.stem) for path in FILES]
APPLIED += [pytest.param("-k", path, id=str(path.relative_to(K8S))) for path in OVERLAYS]


@pytest.mark.parametrize(("flag", "path"), APPLIED)
def test_apply_again_changes_nothing_and_delete_leaves_nothing(cluster: Cluster, flag: str, path: Path) -> None:
    made = cluster.apply(flag, path)
    assert made and all(line.endswith(" created") for line in made)
    before = [cluster.stored(line) for line in made]
    # kubectl sends the selector of a budget each time, and says so, also where it is the same.
    again = {line for line in cluster.apply(flag, path) if not line.startswith("poddisruptionbudget")}
    assert {line.split()[1] for line in again} == {"unchanged"}
    assert [cluster.stored(line) for line in made] == before
    assert len(cluster.lines("delete", flag, str(path))) == len(made)
    for line in made:
        assert cluster.kubectl("get", line.split()[0]).returncode == 1


def test_replace_starts_a_job_again_whether_it_is_there_or_not(cluster: Cluster) -> None:
    path = str(K8S / "train-all-embeddings.yaml")
    for _ in range(2):
        lines = cluster.lines("replace", "--force", "--validate=false", "-f", path)
        assert lines[-1] == "job.batch/fusion-train-all-embeddings replaced"
    assert len(lines) == 2  # deleted, then made again


@pytest.mark.parametrize("path", sorted(set(re.findall(r"kubectl \w[^`\n]* -[fk] (k8s/[\w./-]*\w)", README))))
def test_commands_of_the_readme_name_what_is_there(path: str) -> None:
    assert (K8S.parent / path).exists()
