"""Rules of controllers and CRDs that are not in the schemas: `pytest tests/jobs/test_manifests_admission.py`.

Each rule is documented by the controller that reads the object; an object that breaks it is refused by the cluster.
"""

from __future__ import annotations

import re
from zoneinfo import ZoneInfo

import pytest

from tests.manifests import Object, Workload, one, sources, workloads

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS-1123
SERVICE_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS-1035: begins with a letter
PORT = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")  # IANA_SVC_NAME
RULE = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")  # names in a JobSet's failure policy, without hyphens
VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
N_RANDOM = len("-abcde")  # the suffix that a controller appends to the name of a pod

each_workload = pytest.mark.parametrize("work", workloads(), ids=str)
jobsets = [found for documents in sources().values() for found in documents if found["kind"] == "JobSet"]


def test_there_is_a_jobset() -> None:
    assert jobsets


@pytest.mark.parametrize("jobset", jobsets, ids=lambda found: found["metadata"]["name"])
def test_jobsets_have_valid_names_and_rules(jobset: Object) -> None:
    spec, name = jobset["spec"], jobset["metadata"]["name"]
    rules = spec["failurePolicy"]["rules"]
    names = [rule["name"] for rule in rules]
    assert all(RULE.fullmatch(name) for name in names) and len(set(names)) == len(names) <= 20
    assert {reason for rule in rules for reason in rule["onJobFailureReasons"]} <= REASONS
    assert LABEL.fullmatch(spec["network"]["subdomain"])
    for replicated in spec["replicatedJobs"]:
        assert SERVICE_LABEL.fullmatch(replicated["name"])
        last = max(1, replicated["replicas"]) - 1, replicated["template"]["spec"]["completions"] - 1
        assert len(f"{name}-{replicated['name']}-{last[0]}-{last[1]}") + N_RANDOM <= 63


@each_workload
def test_pod_failure_policies_have_sorted_codes(work: Workload) -> None:
    rules = work.job["podFailurePolicy"]["rules"]
    assert len(rules) <= 20
    for values in (rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule):
        assert values == sorted(set(values)) and 0 not in values and len(values) <= 255


@each_workload
def test_names_within_a_pod_are_valid(work: Workload) -> None:
    pod = work.pod
    names = [one["name"] for one in [*pod["containers"], *pod.get("initContainers", []), *pod["volumes"]]]
    assert all(LABEL.fullmatch(name) for name in names)
    assert all(VARIABLE.fullmatch(entry["name"]) for entry in work.container.get("env", []))


def test_ports_of_services_have_valid_names() -> None:
    ports = [port for documents in sources().values() for found in documents for port in _ports(found)]
    assert ports and all(PORT.fullmatch(port["name"]) for port in ports)


def test_the_nightly_job_has_a_time_zone_that_exists() -> None:
    assert ZoneInfo(one("predict-nightly", "CronJob")["spec"]["timeZone"])


def _ports(found: Object) -> list[Object]:
    return found["spec"]["ports"] if found["kind"] == "Service" else []
