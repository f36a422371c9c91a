"""The multi-node training: its pods start, connect and end together: `pytest tests/jobs/test_manifests_gang.py`."""

from __future__ import annotations

import pytest

from fusion.launch.launcher import _parse
from tests.manifests import Object, Workload, one, selects, workloads

GANG = "train-all-embeddings-multinode"
gangs = [work for work in workloads() if "completionMode" in work.job]


@pytest.fixture(params=gangs, ids=str)
def gang(request: pytest.FixtureRequest) -> Workload:
    return request.param  # type: ignore[no-any-return]


def names(gang: Workload) -> tuple[str, str]:
    """The name of pod 0 and of the subdomain, as the controllers set them."""
    if gang.owner["kind"] == "Job":
        return f"{gang.owner['metadata']['name']}-0", gang.pod["subdomain"]
    jobset = gang.owner["spec"]
    pod = f"{gang.owner['metadata']['name']}-{jobset['replicatedJobs'][0]['name']}-0-0"
    return pod, jobset["network"]["subdomain"]


def test_there_is_a_job_and_a_jobset() -> None:
    assert {gang.owner["kind"] for gang in gangs} == {"Job", "JobSet"}


def test_all_nodes_run_at_the_same_time(gang: Workload) -> None:
    assert gang.job["completionMode"] == "Indexed"
    assert gang.job["completions"] == gang.job["parallelism"] == int(gang.env["PET_NNODES"]) > 1


@pytest.mark.parametrize("index", [0, 1])
def test_the_launcher_finds_its_rank_and_the_master(
    gang: Workload, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**gang.env, "JOB_COMPLETION_INDEX": str(index), "PET_NPROC_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    options = _parse(gang.container["args"][3:])
    pod, subdomain = names(gang)
    assert (options.nnodes, options.node_rank) == (gang.job["completions"], index)
    assert options.master_addr == f"{pod}.{subdomain}"
    assert len(pod) <= 63
    assert options.max_restarts == 0  # the Job or JobSet starts all nodes again


def test_names_of_pods_resolve_before_they_are_ready() -> None:
    service, job = one(GANG, "Service"), one(GANG, "Job")
    spec = service["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    assert spec["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert str(spec["ports"][0]["port"]) == env["MASTER_PORT"]


def test_a_jobset_creates_its_own_service(gang: Workload) -> None:
    if gang.owner["kind"] == "Job":
        return
    network = gang.owner["spec"]["network"]
    assert network["enableDNSHostnames"] is network["publishNotReadyAddresses"] is True
    assert "subdomain" not in gang.pod


def test_permanent_failures_fail_the_jobset() -> None:
    policy = one("overlays/jobset", "JobSet")["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] == 3


def test_the_jobset_contains_the_same_job() -> None:
    """But for what is the JobSet's own."""
    job, jobset = one(GANG, "Job")["spec"], one("overlays/jobset", "JobSet")["spec"]
    inner = jobset["replicatedJobs"][0]["template"]["spec"]
    assert {key for key in job.keys() | inner.keys() if job.get(key) != inner.get(key)} == {
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "template",
    }
    pods = job["template"]["spec"], inner["template"]["spec"]
    assert {key for key in pods[0] if pods[0][key] != pods[1].get(key)} == {"subdomain", "containers"}
    changed = [{entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]} for pod in pods]
    assert {name for name in changed[0] if changed[0][name] != changed[1][name]} == {"MASTER_ADDR"}


@pytest.mark.parametrize("source", [GANG, "overlays/jobset"])
def test_only_pods_of_the_run_may_connect_to_each_other(source: str) -> None:
    spec = one(source, "NetworkPolicy")["spec"]
    peers = [spec["podSelector"], _only_peer(spec["ingress"], "from"), _only_peer(spec["egress"], "to")]
    for work in workloads():
        belongs = work in gangs
        assert [selects(peer, work.labels) for peer in peers] == [belongs] * 3, str(work)


def _only_peer(rules: list[Object], side: str) -> Object:
    (rule,) = rules
    assert set(rule) == {side}  # no ports: NCCL chooses its own
    (peer,) = rule[side]
    return peer["podSelector"]  # type: ignore[no-any-return]
