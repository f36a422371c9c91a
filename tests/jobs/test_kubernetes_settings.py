"""Settings in `k8s/cluster.toml` affect files and submitted jobs: `pytest tests/jobs/test_kubernetes_settings.py`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from fusion.errors import ConfigError, UsageError
from fusion.jobs import manifests
from fusion.jobs.schedulers import kubernetes_settings, slurm_settings
from fusion.jobs.schedulers.description import Job
from fusion.jobs.schedulers.kubectl import Kubectl
from fusion.jobs.schedulers.kubernetes import objects
from tests.jobs.test_submit import here
from tests.manifests import K8S, KUBECTL, Object, sources

GPU = "nvidia.com/gpu"
DIGEST = f"mirror.test:5000/team/fusion@sha256:{'a' * 64}"
VALUES = ["s3://b/data", "1e-5", "yes", "a: b", "a # b", "two words", "'", '"x"', "gs://b/#", "$(HOME)", "-", "*", "ä"]


@pytest.fixture
def k8s(tmp_path: Path) -> Path:
    shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
    return tmp_path / "k8s"


def toml(path: Path, **values: object) -> Path:
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if key != "environment"]
    environment = values.get("environment", {})
    assert isinstance(environment, dict)
    path.write_text("\n".join([*lines, "[environment]", *(f"{k} = {json.dumps(v)}" for k, v in environment.items())]))
    return path


def write(k8s: Path, *flags: str) -> int:
    return manifests.main([f"--folder={k8s}", f"--settings={k8s}/cluster.toml", *flags])


def config_map(k8s: Path) -> dict[str, str]:
    (found,) = (one for one in yaml.safe_load_all((k8s / "config.yaml").read_text()) if one["kind"] == "ConfigMap")
    data: dict[str, str] = found["data"]
    return data


def test_the_committed_files_agree_with_the_settings() -> None:
    assert manifests.main(["--check"]) == 0


def test_image_and_environment_reach_every_file(k8s: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {f"FUSION_V{number}": value for number, value in enumerate(VALUES)} | {"FUSION_DATA": "gs://b/data"}
    toml(k8s / "cluster.toml", image=DIGEST, environment=environment | {"FUSION_EMPTY": ""})
    assert write(k8s, "--check") == 78
    assert "files differ from" in capsys.readouterr().err
    assert write(k8s) == 0 and write(k8s, "--check") == 0
    assert config_map(k8s) == environment
    images = [line for path in k8s.glob("**/*.yaml") for line in path.read_text().splitlines() if "image: " in line]
    assert len(images) > 6 and {line.split("image: ")[1] for line in images} == {DIGEST}


def test_writing_the_old_settings_again_restores_the_files(k8s: Path) -> None:
    before = {path: path.read_text() for path in k8s.glob("**/*.yaml")}
    settings = (k8s / "cluster.toml").read_text()
    toml(k8s / "cluster.toml", image=DIGEST, environment={"FUSION_DATA": "d", "FUSION_OUTPUT": "o"})
    assert write(k8s) == 0
    assert "  # for tools such as aws" not in (k8s / "config.yaml").read_text()
    (k8s / "cluster.toml").write_text(settings)
    assert write(k8s) == 0
    after = {path: path.read_text() for path in k8s.glob("**/*.yaml")}
    assert {path for path in before if before[path] != after[path]} <= {
        k8s / "config.yaml",
        k8s / "base/config/config.yaml",
    }
    assert config_map(k8s) == next(one["data"] for one in sources()["config"] if one["kind"] == "ConfigMap")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image": "fusion:1\nx"}, "image: "),
        ({"image": "fusion 1"}, "image: "),
        ({"image": "f:1", "memory_per_gpu": 0}, "memory_per_gpu: "),
        ({"image": "f:1", "environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "environment holds AWS_SECRET_ACCESS_KEY"),
        ({"image": "f:1", "names": "x"}, "names: "),
        ({}, "image: "),
    ],
)
def test_invalid_settings_are_refused(tmp_path: Path, values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kubernetes_settings.read(toml(tmp_path / "cluster.toml", **values))


def sent(tmp_path: Path, *flags: str, **values: object) -> Object:
    settings = toml(tmp_path / "cluster.toml", **{"image": "registry.example.com/fusion:0.1.0", **values})
    done = here("--cluster=k8s", f"--settings={settings}", "--dry-run", *flags)
    assert done.code == 0, done.err
    job: Object = json.loads(done.out)["items"][-1]
    return job


def test_flags_take_precedence_over_settings(tmp_path: Path) -> None:
    values = {"queue": "few", "priority": "low", "cpus_per_gpu": 6, "memory_per_gpu": 40}
    job = sent(tmp_path, "--gpus-per-node=2", **values)
    pod = job["spec"]["template"]["spec"]
    amounts = {"cpu": 12, "memory": "80Gi", "ephemeral-storage": "4Gi", GPU: 2}
    assert pod["containers"][0]["resources"] == {"requests": amounts, "limits": amounts}
    assert {volume["name"]: volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"]}["shm"] == "10240Mi"
    assert (job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], pod["priorityClassName"]) == ("few", "low")
    flags = ["--queue=many", "--priority=high", "--cpus-per-gpu=1", "--memory-per-gpu=8Gi", "--image=mine:1"]
    job = sent(tmp_path, *flags, **values)
    pod = job["spec"]["template"]["spec"]
    assert (job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], pod["priorityClassName"]) == ("many", "high")
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "8Gi"
    assert pod["containers"][0]["image"] == "mine:1"
    evaluation = sent(tmp_path, "--task=evaluate", **values)
    assert evaluation["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == 4


def test_the_image_of_the_files_does_not_change_the_name_of_a_job(tmp_path: Path) -> None:
    assert sent(tmp_path)["metadata"]["name"] == "fusion-train-all-embeddings"
    assert sent(tmp_path, image=DIGEST)["metadata"]["name"] != "fusion-train-all-embeddings"


def test_a_submitted_jobset_is_that_of_the_overlay() -> None:
    policy, jobset = objects(Job("all_embeddings", "train", nodes=2, jobset=True))
    overlay = {one["kind"]: one for one in sources()["overlays/jobset"]}
    assert policy == overlay["NetworkPolicy"]
    assert _sorted_env(jobset) == _sorted_env(overlay["JobSet"])


def test_a_jobset_of_other_settings_has_names_of_its_own() -> None:
    job = Job("qwen_clip", "train", ("--source", "train-all-embeddings-jobset"), nodes=3, jobset=True, queue="few")
    policy, jobset = objects(job)
    name, spec = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (3, 3, 0)
    assert (env["PET_NNODES"], env["MASTER_ADDR"]) == ("3", f"{name}-nodes-0-0.{name}")
    assert jobset["spec"]["network"]["subdomain"] == name and len(f"{name}-nodes-0-2-abcde") <= 63
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "few"
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert container["args"][-1] == "train-all-embeddings-jobset"
    assert "all-embeddings" not in json.dumps([policy, jobset]).replace(container["args"][-1], "")


def test_slurm_gets_the_same_resources_by_its_own_names(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text('folder = "logs"\npartition = "cpu"\n')
    cluster = slurm_settings.read(tmp_path / "cluster.toml", "train")
    job = Job("qwen_clip", "train", gpus_per_node=4, cpus_per_gpu=8, memory_per_gpu=64, queue="gpu", priority="high")
    parameters = cluster.asked(job).parameters("train", 4)
    expected = {"partition": "gpu", "qos": "high", "cpus_per_task": 32, "mem": "256G", "gpus_per_node": 4}
    assert {key: parameters[key] for key in expected} == expected
    assert cluster.asked(Job("qwen_clip", "train")) == cluster
    (tmp_path / "cluster.toml").write_text('folder = "logs"\ncpus_per_gpu = 6\nmemory_per_gpu = 40\nmem_gb = 7\n')
    cluster = slurm_settings.read(tmp_path / "cluster.toml", "train")
    asked = cluster.asked(Job("qwen_clip", "train", gpus_per_node=2, cpus_per_gpu=8))
    assert (asked.cpus_per_node, asked.mem_gb) == (16, 80)
    without = cluster.asked(Job("qwen_clip", "train", gpus_per_node=0))
    assert (without.cpus_per_node, without.mem_gb) == (4, 7)
    with pytest.raises(UsageError, match="--cpus-per-gpu is 2, and the job asks for no GPU"):
        cluster.asked(Job("qwen_clip", "evaluate", cpus_per_gpu=2))


def test_the_namespace_is_that_of_the_context_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [{"name": name, "context": {"cluster": "c", "namespace": f"of-{name}"}} for name in ("one", "two")]
    (tmp_path / "config").write_text(json.dumps({"contexts": contexts, "current-context": "one"}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("PATH", f"{Path(KUBECTL).parent}:{os.environ['PATH']}")
    assert Kubectl.now(None) == Kubectl("one", "of-one")
    assert Kubectl.now(None, "two") == Kubectl("two", "of-two")
    assert Kubectl.now("mine", "two") == Kubectl("two", "mine")
    with pytest.raises(ConfigError, match="the kubeconfig has no context three, there are: one, two"):
        Kubectl.now(None, "three")


def _sorted_env(jobset: Object) -> Object:
    found: Object = json.loads(json.dumps(jobset))
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["env"].sort(key=lambda one: one["name"])
    return found
