"""The manifests follow the schemas of Kubernetes and this project's rules: `pytest tests/jobs/test_manifests.py`."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from fusion import __version__
from fusion.errors import ExitCode
from tests.manifests import FILES, K8S, Object, Workload, objects, one, rendered, selects, sources, workloads

README = (K8S / "README.md").read_text()
VERSIONS = ("1.29", "1.31", "1.33")
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS-1123 label
QUANTITY = re.compile(r"(\d+)(m|Ki|Mi|Gi|Ti)?")
UNITS = {"": 1.0, "m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
RETRIED = {ExitCode.UNREACHABLE, ExitCode.STALLED}

ORDERS = {  # the same order of keys in all files, so that they can be compared by eye
    "job": "completionMode completions parallelism backoffLimit activeDeadlineSeconds podFailurePolicy "
    "podReplacementPolicy ttlSecondsAfterFinished template",
    "pod": "serviceAccountName automountServiceAccountToken enableServiceLinks restartPolicy "
    "terminationGracePeriodSeconds subdomain securityContext tolerations containers volumes",
    "container": "name image imagePullPolicy args envFrom env resources securityContext terminationMessagePolicy "
    "volumeMounts",
}

each_workload = pytest.mark.parametrize("work", workloads(), ids=str)
each_object = pytest.mark.parametrize(
    "found", [pytest.param(found, id=f"{n}:{found['kind']}") for n, found in objects()]
)


def number(quantity: Any) -> float:
    match = QUANTITY.fullmatch(str(quantity))
    assert match, f"{quantity!r} is not a quantity"
    return int(match[1]) * UNITS[match[2] or ""]


def codes(work: Workload, action: str) -> set[int]:
    rules = [rule["onExitCodes"] for rule in work.job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    actions = [rule["action"] for rule in work.job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    return {code for rule, taken in zip(rules, actions, strict=True) if taken == action for code in rule["values"]}


@pytest.mark.parametrize("version", VERSIONS)
@each_object
def test_objects_follow_the_schemas(found: Object, version: str) -> None:
    if found["kind"] == "JobSet":
        # The models drop unknown fields, so that these would show as a difference. The Job within is checked below.
        assert JobsetV1alpha2JobSet.from_dict(found).to_dict() == found
        spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
        found = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "within"}, "spec": spec}
    if found["kind"] == "RayJob":
        return  # tests/jobs/test_manifests_ray.py
    kubernetes_validate.validate(found, version, strict=True)  # a kind without a schema is an error too


@each_object
def test_objects_have_valid_names_and_our_labels(found: Object) -> None:
    name, labels = found["metadata"]["name"], found["metadata"]["labels"]
    assert NAME.fullmatch(name)
    assert len(name) <= (52 if found["kind"] == "CronJob" else 57)  # CronJobs and indexes append to it
    assert "namespace" not in found["metadata"]  # kubectl's -n sets it
    assert labels["app.kubernetes.io/name"] == labels["app.kubernetes.io/part-of"] == "fusion"
    assert labels["app.kubernetes.io/version"] == __version__
    assert {"app.kubernetes.io/instance", "app.kubernetes.io/component"} <= set(labels)


def test_every_file_is_known() -> None:
    jobs = {"train-all-embeddings", "train-qwen-clip", "evaluate-all-embeddings", "predict-nightly", "prepare"}
    assert {path.stem for path in FILES} == {"config", *jobs, "train-all-embeddings-multinode"}
    overlays = {name.split("/")[1] for name in sources() if name.startswith("overlays/")}
    assert overlays == {"spot", "kueue", "cpu-smoke", "eks", "gke", "jobset", "ray"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_a_link_to_its_base(path: Any) -> None:
    base, plain = (
        {(found["kind"], found["metadata"]["name"]): found for found in yaml.safe_load_all(text)}
        for text in (rendered(K8S / "base" / path.stem), path.read_text())
    )
    assert path.is_symlink()
    assert base == plain
    assert f"kubectl apply -f k8s/{path.name}" in path.read_text()


@each_workload
def test_pods_have_restricted_security_contexts(work: Workload) -> None:
    pod = work.pod
    assert pod["securityContext"] == {
        **dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), 10001),
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod["serviceAccountName"] == "fusion"
    assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert work.labels["sidecar.istio.io/inject"] == "false"
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
        assert container["image"] == f"registry.example.com/fusion:{__version__}"


@each_workload
def test_one_container_whose_command_is_in_args(work: Workload) -> None:
    assert [container["name"] for container in work.pod["containers"]] == ["fusion"]
    assert "command" not in work.container  # so that the image's init is process 1 and forwards signals
    assert work.container["args"][:3] == ["python", "-m", "fusion.launch"]
    assert all(isinstance(argument, str) for argument in work.container["args"])
    assert work.container["envFrom"] == [
        {"configMapRef": {"name": "fusion-config"}},
        {"secretRef": {"name": "fusion-credentials", "optional": True}},
    ]
    # Overlays insert variables before others, and $(NAME) only refers to variables that come earlier.
    assert not any("$(" in value for value in work.env.values())


@each_workload
def test_resources_are_guaranteed_and_cover_the_volumes(work: Workload) -> None:
    for container in [work.container, *work.pod.get("initContainers", [])]:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests == limits
        assert all(number(quantity) > 0 for quantity in limits.values())
    sizes = {volume["name"]: volume["emptyDir"] for volume in work.pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in work.container["volumeMounts"]}
    limits = work.container["resources"]["limits"]
    assert mounts == {"/tmp": "tmp", "/cache": "cache", "/dev/shm": "shm"}
    assert sizes["shm"]["medium"] == "Memory"
    assert number(sizes["shm"]["sizeLimit"]) <= number(limits["memory"]) / 4  # its content counts as memory
    on_disk = [number(sizes[name]["sizeLimit"]) for name in ("tmp", "cache")]
    assert sum(on_disk) < number(limits["ephemeral-storage"])
    trains = work.labels["app.kubernetes.io/component"] == "train"
    assert ("nvidia.com/gpu" in limits) == trains
    assert any(t.get("key") == "nvidia.com/gpu" for t in work.pod.get("tolerations", [])) == trains
    assert (work.env.get("FUSION_DEVICE") == "cuda") == trains  # with a CPU image it ends instead of training slowly
    assert "OMP_NUM_THREADS" not in str(work.job)  # the launcher divides the container's CPUs among its ranks


@each_workload
def test_the_pod_failure_policy_covers_all_exit_codes(work: Workload) -> None:
    rules = work.job["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert len(rules) == 3
    for rule in rules[1:]:
        assert (rule["onExitCodes"]["containerName"], rule["onExitCodes"]["operator"]) == ("fusion", "In")
    assert codes(work, "Ignore") == {ExitCode.STOPPED}
    assert codes(work, "FailJob") == set(ExitCode) - {ExitCode.DONE, ExitCode.STOPPED} - RETRIED


@each_workload
def test_jobs_limit_tries_and_lifetime(work: Workload) -> None:
    job = work.job
    assert work.pod["restartPolicy"] == "Never"  # podFailurePolicy sees only pods that ended
    assert job["podReplacementPolicy"] == "Failed"  # never two pods of one run at the same time
    within_jobset = work.owner["kind"] == "JobSet"
    ttl = work.owner["spec"] if within_jobset else job
    assert ttl["ttlSecondsAfterFinished"] >= 3 * 24 * 3600  # a failed job can be examined after a weekend
    assert within_jobset == ("ttlSecondsAfterFinished" not in job)  # otherwise the JobSet would create it again
    assert "backoffLimitPerIndex" not in job
    tries = job.get("completions", 1) * 3
    assert job["backoffLimit"] == (0 if within_jobset else tries)
    assert ("activeDeadlineSeconds" in job) == (work.labels["app.kubernetes.io/component"] != "train")


@pytest.mark.parametrize("work", [work for work in workloads() if not work.source.startswith("overlays")], ids=str)
def test_keys_are_in_the_same_order(work: Workload) -> None:
    for name, part in {"job": work.job, "pod": work.pod, "container": work.container}.items():
        assert list(part) == [key for key in ORDERS[name].split() if key in part]


def test_the_nightly_job_has_deadlines_and_one_time_zone() -> None:
    spec = one("predict-nightly", "CronJob")["spec"]
    args = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["timeZone"] == args[args.index("--time-zone") + 1]
    deadline = spec["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert spec["startingDeadlineSeconds"] >= 600
    assert spec["startingDeadlineSeconds"] + deadline < 24 * 3600
    at = re.fullmatch(r"\d+ (\d+) \* \* \*", spec["schedule"])
    assert at and at[1] != "2"  # not in the hour that daylight saving time skips or repeats


@each_workload
def test_the_network_policy_covers_every_job(work: Workload) -> None:
    spec = one("config", "NetworkPolicy")["spec"]
    assert selects(spec["podSelector"], work.labels)
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == []
    ports = {(port["protocol"], port["port"]) for rule in spec["egress"] for port in rule["ports"]}
    assert ports == {("UDP", 53), ("TCP", 53), ("TCP", 443)}


@each_workload
def test_the_disruption_budget_is_for_trainings_and_does_not_block_drains(work: Workload) -> None:
    spec = one("config", "PodDisruptionBudget")["spec"]
    assert selects(spec["selector"], work.labels) == (work.labels["app.kubernetes.io/component"] == "train")
    assert spec["minAvailable"] == 0  # a number is the only form that works for pods of Jobs


def test_no_object_uses_a_kubernetes_token() -> None:
    accounts = [found for _, found in objects() if found["kind"] == "ServiceAccount"]
    assert accounts
    assert all(account["automountServiceAccountToken"] is False for account in accounts)
    assert not any(found["kind"] in ("Secret", "Role", "RoleBinding") for _, found in objects())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"kubectl \w[^`\n]* -[fk] (k8s/[\w./-]*\w)", README))))
def test_files_in_commands_of_the_readme_exist(path: str) -> None:
    assert (K8S.parent / path).exists()
