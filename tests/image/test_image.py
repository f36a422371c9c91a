"""The image as it is built and run: what is in it, what it may do, and the jobs of k8s/ from start to submission."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

import fusion
from fusion import storage
from fusion.verify import main as verify
from tests.conftest import upload
from tests.image import engine, inside
from tests.image.engine import ROOT, podman
from tests.image.pods import playing
from tests.s3_server import WRITER_KEY, WRITER_SECRET, S3Server
from tests.services import require

pytestmark = pytest.mark.image

KEYS = {"AWS_ACCESS_KEY_ID": WRITER_KEY, "AWS_SECRET_ACCESS_KEY": WRITER_SECRET}
TRAIN, EVALUATE, PREDICT = "train-all-embeddings", "evaluate-all-embeddings", "predict-nightly"
SMALL = {"FUSION_WIDTH": "16", "FUSION_HIDDEN": "16,8", "FUSION_BATCH_SIZE": "64"}
LONG = {"FUSION_EPOCHS": "60", "FUSION_PATIENCE": "60", "FUSION_CHECKPOINT_STEPS": "5"}

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def image() -> str:
    require(engine.available(), "podman")
    return engine.build()


@pytest.fixture(scope="module")
def facts(image: str, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What a process finds in the pod of a training."""
    probe = ["python", "-c", Path(inside.__file__).read_text()]
    with playing(TRAIN, {}, {}, tmp_path_factory.mktemp("probe"), probe) as pod:
        assert pod.wait() == 0
        found: Facts = json.loads(podman("logs", pod.container))
    return found


def test_a_pod_is_unprivileged_and_writes_to_tmp_and_cache_only(facts: Facts) -> None:
    assert facts["ids"] == [10001, 10001]
    assert (facts["capabilities"], facts["no_new_privileges"]) == (0, 1)
    assert facts["writable"] == ["/cache", "/tmp"]


def test_a_first_process_that_buries_the_dead(facts: Facts) -> None:
    assert (facts["first_process"], facts["zombies"]) == ("tini", 0)


def test_no_compiler_and_no_installer(facts: Facts) -> None:
    assert facts["tools"] == facts["installers"] == []


def test_the_locked_packages_and_no_others(facts: Facts) -> None:
    installed = {_plain(package).partition("+")[0] for package in facts["packages"]}
    locked = {_plain(line) for line in (ROOT / "constraints.txt").read_text().split()}
    assert installed <= locked
    assert not {package.partition("==")[0] for package in installed} & {"pytest", "mypy", "ruff", "boto3"}


def _plain(requirement: str) -> str:
    return requirement.lower().replace("_", "-")


def test_where_nothing_is_demanded_it_still_cannot_change_what_it_runs(image: str) -> None:
    """As on a laptop, with a root file system that is not read-only."""
    plain = json.loads(podman("run", "--rm", image, "python", "-c", Path(inside.__file__).read_text()))
    assert plain["ids"] == [10001, 10001]
    assert not [path for path in plain["writable"] if path.startswith(("/app", "/opt", "/usr", "/etc"))]


def test_the_labels_and_the_revision(image: str, facts: Facts) -> None:
    labels = json.loads(podman("image", "inspect", "--format", "{{json .Config.Labels}}", image))
    found = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert (found["title"], found["version"], found["revision"]) == ("fusion", fusion.__version__, _revision())
    assert facts["environment"]["FUSION_REVISION"] == _revision()


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_its_size(image: str) -> None:
    """The packages for a CPU take 1.2 GB, 0.3 GB less than with the tests and headers that they bring."""
    image_size, base_size = (_size(name) for name in (image, engine.base()))
    assert image_size - base_size < 1.3e9


def _size(name: str) -> int:
    return int(podman("image", "inspect", "--format", "{{.Size}}", name))


def test_without_a_command_it_says_how_it_is_used(image: str) -> None:
    assert "usage: python -m fusion.launch" in podman("run", "--rm", image)


def test_the_jobs_from_a_stopped_training_to_a_submission(
    image: str, s3: S3Server, bucket: str, catalog: Path, tmp_path: Path
) -> None:
    upload(catalog, f"{bucket}/data")
    output = f"{bucket}/output"
    settings = {"FUSION_DATA": f"{bucket}/data", "FUSION_OUTPUT": output, "AWS_ENDPOINT_URL_S3": s3.endpoint, **SMALL}
    training = {**settings, **LONG, "FUSION_RUN_ID": "r"}

    with playing(TRAIN, training, KEYS, tmp_path) as pod:
        _wait_for_checkpoint(f"{output}/runs/r")
        pod.stop()
        assert pod.wait() == 75
    stopped = json.loads(storage.read(f"{output}/runs/r/attempts/1/exit.json"))["step"]
    with playing(TRAIN, training, KEYS, tmp_path) as pod:
        assert pod.wait() == 0
        assert f"step={stopped}" in pod.log()
    for file in (EVALUATE, PREDICT):
        with playing(file, settings, KEYS, tmp_path) as pod:
            assert pod.wait() == 0

    assert json.loads(storage.read(f"{output}/runs/r/run.json"))["revision"] == _revision()
    assert storage.exists(f"{output}/runs/r/metrics/summary.json")
    assert verify([f"{output}/runs/r"]) == verify([f"{output}/pointers/submissions/prices/current.json"]) == 0


def test_the_smoke_job_with_two_ranks_and_a_catalog_of_its_own(
    image: str, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    settings = {"FUSION_OUTPUT": f"{bucket}/output", "AWS_ENDPOINT_URL_S3": s3.endpoint}
    with playing("overlays/cpu-smoke", settings, KEYS, tmp_path) as pod:
        assert pod.wait() == 0
    assert storage.exists(f"{bucket}/output/smoke/pointers/runs/all_embeddings/best.json")


def test_by_hand_as_readme_has_it_and_stopped_with_ctrl_c(image: str, s3: S3Server, bucket: str, catalog: Path) -> None:
    upload(catalog, f"{bucket}/data")
    shown = re.search(r"^docker (run .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown
    names = {"s3://my-bucket": bucket, f"fusion:{fusion.__version__}": image, "\\\n": ""}
    command = re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], shown[1]).split()
    settings = [f"--env={key}={value}" for key, value in (SMALL | LONG | {"FUSION_RUN_ID": "r"}).items()]
    command[1:1] = ["--network=host", *settings]
    with subprocess.Popen(["podman", *command], env=engine.environment()) as container:
        try:
            _wait_for_checkpoint(f"{bucket}/output/runs/r")
            container.send_signal(signal.SIGINT)
            assert container.wait(180) == 75
        finally:
            container.terminate()


def _wait_for_checkpoint(run: str) -> None:
    deadline = time.monotonic() + 300
    files, folder = fsspec.core.url_to_fs(f"{run}/checkpoints", use_listings_cache=False)
    while not files.glob(f"{folder}/*/MANIFEST.json"):
        assert time.monotonic() < deadline, "no checkpoint in 300 s"
        time.sleep(0.1)
