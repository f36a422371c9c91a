"""The image: its contents, its permissions, its reproducibility, and the jobs of k8s/ run in it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

import fusion
from fusion import storage
from fusion.verify.__main__ import main as verify
from tests.conftest import upload
from tests.image import engine, inside
from tests.image.engine import ROOT, podman
from tests.image.pods import playing
from tests.s3_server import WRITER_KEY, WRITER_SECRET, S3Server
from tests.services import require

pytestmark = pytest.mark.image

AGAIN = "localhost/fusion:again"
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
    """The facts that `tests.image.inside` prints in the pod of a training."""
    probe = ["python", "-c", Path(inside.__file__).read_text()]
    with playing(TRAIN, {}, {}, tmp_path_factory.mktemp("probe"), probe) as pod:
        assert pod.wait() == 0
        found: Facts = json.loads(podman("logs", pod.container))
    return found


def test_a_pod_is_unprivileged_and_writes_to_tmp_and_cache_only(facts: Facts) -> None:
    assert facts["ids"] == [10001, 10001]
    assert (facts["capabilities"], facts["no_new_privileges"]) == (0, 1)
    assert facts["writable"] == ["/cache", "/tmp"]


def test_the_first_process_reaps_zombies(facts: Facts) -> None:
    assert (facts["first_process"], facts["zombies"]) == ("tini", 0)


def test_the_image_has_no_compiler_and_no_installer(facts: Facts) -> None:
    assert facts["tools"] == facts["installers"] == []


def test_the_image_has_only_locked_packages(facts: Facts) -> None:
    installed = {_plain(package).partition("+")[0] for package in facts["packages"]}
    locked = {_plain(line) for line in (ROOT / "constraints.txt").read_text().split()}
    assert installed <= locked
    assert not {package.partition("==")[0] for package in installed} & {"pytest", "mypy", "ruff", "boto3"}


def _plain(requirement: str) -> str:
    return requirement.lower().replace("_", "-")


def test_the_bill_of_materials_lists_all_packages(image: str, facts: Facts) -> None:
    bill = json.loads(podman("run", "--rm", image, "cat", "/opt/venv/sbom.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    found = {f"{one['name']}=={one['version']}" for one in bill["components"] if one["purl"].startswith("pkg:pypi/")}
    assert found == set(facts["packages"])
    debian = {one["name"] for one in bill["components"] if one["purl"].startswith("pkg:deb/debian/")}
    assert {"tini", "libc6"} <= debian
    assert len({one["bom-ref"] for one in bill["components"]}) == len(bill["components"])


@pytest.fixture(scope="module")
def second_build(image: str) -> Iterator[Future[tuple[int, str]]]:
    """A second build of the same commit without a cache, which runs while other tests run."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(engine.make_image, ROOT, AGAIN, "--no-cache")
        podman("rmi", "--force", AGAIN)


def test_a_change_of_code_does_not_install_packages_again(image: str, changed: Path) -> None:
    with (changed / "fusion" / "__init__.py").open("a") as code:
        code.write("\n# changed\n")
    name = "localhost/fusion:changed"
    code, said = engine.make_image(changed, name)
    assert code == 0, said
    assert "Installing collected packages" not in said
    before, after = (set(_inspect(one, "RootFS.Layers")) for one in (image, name))
    assert 1 <= len(after - before) <= 2, "more layers changed than the code and /cache"
    podman("rmi", "--force", name)


def test_a_wrong_hash_stops_the_build(image: str, changed: Path) -> None:
    lock = changed / "requirements" / "run.txt"
    first, *others = re.split(r"^(?=\w)", lock.read_text(), flags=re.MULTILINE)[1:]
    lock.write_text(re.sub(r"sha256:\w{8}", "sha256:00000000", first) + "".join(others))
    code, said = engine.make_image(changed, "localhost/fusion:wrong")
    assert code != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in said


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A clone of the repository with the files of this working tree that the image is built from."""
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(tmp_path / "clone")], check=True)
    for name in ("Makefile", "Dockerfile", ".dockerignore", "requirements", "fusion", "jobs"):
        subprocess.run(["cp", "-r", str(ROOT / name), f"{tmp_path}/clone/"], check=True)
    return tmp_path / "clone"


def test_without_a_read_only_root_the_code_is_still_not_writable(image: str) -> None:
    """As on a laptop, where the container is started without restrictions."""
    plain = json.loads(podman("run", "--rm", image, "python", "-c", Path(inside.__file__).read_text()))
    assert plain["ids"] == [10001, 10001]
    assert not [path for path in plain["writable"] if path.startswith(("/app", "/opt", "/usr", "/etc"))]


def test_the_command_fusion_is_on_the_path(image: str) -> None:
    found = podman("run", "--rm", image, "fusion", "version").splitlines()
    assert found[:2] == [f"fusion {fusion.__version__}", f"revision  {_revision()}"]


def test_labels_name_the_version_revision_and_base(image: str, facts: Facts) -> None:
    labels = _inspect(image, "Config.Labels")
    found = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert (found["title"], found["version"], found["revision"]) == ("fusion", fusion.__version__, _revision())
    assert found["base.name"].endswith(f"@{found['base.digest']}") and found["base.digest"].startswith("sha256:")
    assert facts["environment"]["FUSION_REVISION"] == _revision()


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_image_adds_less_than_1_3_gb_to_its_base(image: str) -> None:
    """The packages for a CPU take 1.15 GB. With their tests and headers they would take 1.45 GB."""
    image_size, base_size = (_size(name) for name in (image, engine.base()))
    assert image_size - base_size < 1.3e9


def _size(name: str) -> int:
    return int(_inspect(name, "Size"))


def _inspect(name: str, field: str) -> Any:
    return json.loads(podman("image", "inspect", "--format", f"{{{{json .{field}}}}}", name))


def test_without_a_command_the_image_prints_its_usage(image: str) -> None:
    assert "usage: python -m fusion.launch" in podman("run", "--rm", image)


def test_a_training_resumes_after_a_stop_and_is_evaluated_and_predicted(
    image: str, second_build: object, s3: S3Server, bucket: str, catalog: Path, tmp_path: Path
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


def test_the_smoke_job_generates_data_and_trains_on_two_ranks(
    image: str, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    settings = {"FUSION_OUTPUT": f"{bucket}/output", "AWS_ENDPOINT_URL_S3": s3.endpoint}
    with playing("overlays/cpu-smoke", settings, KEYS, tmp_path) as pod:
        assert pod.wait() == 0
    assert storage.exists(f"{bucket}/output/smoke/pointers/runs/all_embeddings/best.json")


def test_the_command_of_the_page_trains_and_stops_with_ctrl_c(
    image: str, s3: S3Server, bucket: str, catalog: Path
) -> None:
    upload(catalog, f"{bucket}/data")
    shown = re.search(r"^docker (run .*?)^```", (ROOT / "docs/howto/image.md").read_text(), re.MULTILINE | re.DOTALL)
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


def test_two_builds_of_a_commit_are_identical(image: str, second_build: Future[tuple[int, str]]) -> None:
    code, said = second_build.result()
    assert code == 0, said
    assert _inspect(image, "ID") == _inspect(AGAIN, "ID")


def _wait_for_checkpoint(run: str) -> None:
    deadline = time.monotonic() + 300
    files, folder = fsspec.core.url_to_fs(f"{run}/checkpoints", use_listings_cache=False)
    while not files.glob(f"{folder}/*/MANIFEST.json"):
        assert time.monotonic() < deadline, "no checkpoint in 300 s"
        time.sleep(0.1)
