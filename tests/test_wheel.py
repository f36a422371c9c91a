"""The wheel works alone: `pytest tests/test_wheel.py`, in about half a minute.

It is built from the files of this checkout and installed into a virtual environment of its own. The libraries come from
the environment of the tests, by a path file, so that nothing is downloaded; Fusion comes from the wheel alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import fusion
from tests.conftest import SMALL

ROOT = Path(__file__).parents[1]
TRAIN = [*SMALL, "--epochs", "1", "--seeds", "1", "--neighbours", "0", "--components", "0"]


def tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy, because setuptools writes beside the code."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked("fusion", "jobs", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    (made,) = (source / "dist").glob("*.whl")
    return made


class Installed:
    """A virtual environment with the wheel."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False)
        self.bin = folder / "venv" / "bin"
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.bin / "python"),
            "install",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*command, str(wheel)], capture_output=True, check=True)
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        # Path files inside of this folder, such as that of an editable Fusion, have no effect here.
        (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))

    def __call__(self, *command: str) -> str:
        """Runs a program of the environment in an empty folder; returns its output."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("FUSION_", "PYTHON"))}
        program, *arguments = command
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=self.folder,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_has_all_files_of_the_package_and_no_others(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == {name for name in tracked("fusion") if not name.endswith("README.md")}


def test_the_metadata_names_the_license_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    text = archive.read(metadata["METADATA"]).decode()
    assert "License-Expression: Apache-2.0\n" in text and f"Version: {fusion.__version__}\n" in text
    assert archive.read(metadata["licenses/LICENSE"]).decode() == (ROOT / "LICENSE").read_text()
    assert archive.read(metadata["entry_points.txt"]).decode() == "[console_scripts]\nfusion = fusion.__main__:main\n"
    assert archive.read(metadata["top_level.txt"]).decode() == "fusion\n"


def test_commands_and_names_come_from_the_wheel(installed: Installed) -> None:
    assert "train VARIANT" in installed("fusion", "--help")
    code = "import fusion; print(fusion.__file__); [getattr(fusion, name) for name in fusion.__all__]"
    assert installed("python", "-c", code).startswith(str(installed.folder))
    code = "import importlib.util; print(importlib.util.find_spec('jobs'))"
    assert installed("python", "-c", code) == "None\n"
    assert "fusion submit --cluster local" in installed("fusion", "submit", "--help")


def test_jobs_are_sent_from_a_folder_with_the_files_of_the_cluster(installed: Installed) -> None:
    shutil.copytree(ROOT / "k8s", installed.folder / "k8s")
    sent = installed("fusion", "submit", "--cluster", "k8s", "--dry-run", "--variant", "qwen_clip")
    assert "name: fusion-train-qwen-clip" in sent or '"fusion-train-qwen-clip"' in sent


def test_a_model_is_trained_evaluated_and_used(installed: Installed, catalog: Path) -> None:
    output = str(installed.folder / "output")
    installed("fusion", "train", "qwen_clip", "--data", str(catalog), "--output", output, *TRAIN)
    installed("fusion", "evaluate", "--output", output, "--device", "cpu")
    installed("python", "-m", "fusion.qwen_clip.predict_test", "--output", output, "--device", "cpu")
    assert installed("fusion", "verify", output).endswith("OK\n")
    assert "qwen_clip" in installed("fusion", "pull", "runs", "--output", output)
    (run,) = (Path(output) / "runs").iterdir()
    assert installed("fusion", "report", "--run-dir", str(run)).endswith("report.html\n")


def test_a_tag_and_the_documents_have_the_version_of_the_code() -> None:
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation and citation[1] == fusion.__version__
    assert f"\n## {fusion.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
        in (ROOT / "CITATION.cff").read_text()
    )
    tags = subprocess.run(
        ["git", "tag", "--points-at", "HEAD", "v*"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(tag == f"v{fusion.__version__}" for tag in tags.stdout.split())
