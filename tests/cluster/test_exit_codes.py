"""What a Job does after each exit code, as in the table of k8s/README.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import store
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import made
from tests.cluster.namespace import Namespace
from tests.manifests import Object

pytestmark = pytest.mark.cluster

SOURCE, JOB = "base/train-qwen-clip", "fusion-train-qwen-clip"
TRAIN = ["python", "-m", "fusion.launch", "fusion.qwen_clip.train"]
MEMORY = "POD/containers/0/resources/{}/memory"
REFUSED = {"AWS_ENDPOINT_URL_S3": f"{store.ENDPOINT.rpartition(':')[0]}:1", "FUSION_STORE_TIMEOUT": "1"}

# User errors by exit code: the environment, the arguments, and a text in the container's message.
MADE: dict[int, tuple[dict[str, str], list[str], str]] = {
    64: ({}, [*TRAIN, "--no-such-flag", "1"], "no-such-flag"),
    65: ({"FUSION_DATA": "s3://no-such-bucket/data"}, TRAIN, "no-such-bucket"),
    69: (REFUSED, TRAIN, "hint:"),
    77: ({"AWS_SECRET_ACCESS_KEY": "wrong"}, TRAIN, "hint:"),
    78: ({"FUSION_DEVICE": "cuda"}, TRAIN, "GPU"),
}
FINAL, COUNTED = (64, 65, 70, 77, 78), (1, 69, 124, 137)


def exits(code: int) -> list[str]:
    return ["sh", "-c", f"echo 'error: as the test says' >&2; exit {code}"]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """One Job per exit code, all running together: exit-CODE runs a shell, made-CODE the project with a user error."""
    for namespace in made(cluster, "exit codes", tmp_path_factory):
        for code in (*FINAL, *COUNTED, 75):
            _start(namespace, f"exit-{code}", exits(code))
        for code, (environment, args, _) in MADE.items():
            _start(namespace, f"made-{code}", args, environment)
        too_little = [
            {"op": "replace", "path": MEMORY.format(kind), "value": "60Mi"} for kind in ("requests", "limits")
        ]
        _start(namespace, "made-137", TRAIN, {}, too_little)
        yield namespace


def _start(
    namespace: Namespace,
    name: str,
    args: list[str],
    environment: dict[str, str] | None = None,
    more: list[Object] | None = None,
) -> None:
    changes: list[Object] = [{"op": "replace", "path": "/metadata/name", "value": name}]
    changes += [{"op": "replace", "path": "POD/containers/0/args", "value": args}, *(more or [])]
    namespace.apply(SOURCE, environment, changes)


def ends(namespace: Namespace, job: str) -> list[Object]:
    """The terminated states of the containers of a Job's pods, with exitCode, reason and message."""
    states = (pod["status"].get("containerStatuses", [{"state": {}}])[0]["state"] for pod in namespace.pods(job))
    return [state["terminated"] for state in states if "terminated" in state]


def first_end(namespace: Namespace, job: str) -> Object:
    found: list[Object] = namespace.until(lambda: ends(namespace, job), f"a pod of {job} that has ended")
    return found[0]


@pytest.mark.parametrize("code", FINAL)
def test_permanent_failures_fail_the_job_at_once(jobs: Namespace, code: int) -> None:
    assert jobs.ended(f"exit-{code}") == "PodFailurePolicy"
    assert [end["exitCode"] for end in ends(jobs, f"exit-{code}")] == [code]


@pytest.mark.parametrize("code", COUNTED)
def test_transient_failures_are_tried_again_and_counted(jobs: Namespace, code: int) -> None:
    jobs.until(lambda: len(ends(jobs, f"exit-{code}")) > 1, f"a second try of exit-{code}")
    assert {end["exitCode"] for end in ends(jobs, f"exit-{code}")} == {code}
    assert jobs.get("jobs", f"exit-{code}")["status"]["failed"] >= 1


@pytest.mark.parametrize("code", MADE)
def test_user_errors_end_with_their_code_and_a_hint(jobs: Namespace, code: int) -> None:
    end = first_end(jobs, f"made-{code}")
    said = end["message"].splitlines()
    assert end["exitCode"] == code, end["message"]
    assert MADE[code][2] in end["message"]
    assert [line.partition(":")[0] for line in said[-2:]] == ["error", "hint"]


def test_out_of_memory_ends_with_137_and_is_tried_again(jobs: Namespace) -> None:
    end = first_end(jobs, "made-137")
    assert (end["exitCode"], end["reason"]) == (137, "OOMKilled")
    jobs.until(lambda: len(ends(jobs, "made-137")) > 1, "a second try")


def test_a_job_fails_after_four_tries(jobs: Namespace) -> None:
    assert jobs.ended("exit-69") == "BackoffLimitExceeded"
    assert len(ends(jobs, "exit-69")) == 4


def test_a_stop_on_request_is_continued_and_not_counted(jobs: Namespace) -> None:
    jobs.until(lambda: len(ends(jobs, "exit-75")) > 2, "a third try")  # tries are 10 s and 20 s apart
    assert not jobs.get("jobs", "exit-75")["status"].get("failed")
