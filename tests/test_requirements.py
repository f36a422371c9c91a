"""The packages of the image are locked by hash, in the versions that the tests run with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(path: Path) -> dict[str, str]:
    """{name: version} of a file of `name==version` lines."""
    pins = re.findall(r"^([\w.-]+)==([^\s\\]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version.partition("+")[0] for name, version in pins}


TESTED = pinned(ROOT / "constraints.txt")


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_requirement_has_a_version_and_hashes(lock: Path) -> None:
    for entry in re.split(r"\n(?! )", lock.read_text().strip()):
        assert re.fullmatch(r"[\w.-]+==[\w.+]+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_versions_are_those_of_the_tests(lock: Path) -> None:
    found = pinned(lock)
    of_cuda = {name for name in found if name.startswith(("cuda-", "nvidia-", "triton"))}
    assert {name: version for name, version in found.items() if name not in of_cuda} == {
        name: TESTED[name] for name in found.keys() - of_cuda
    }
    assert not of_cuda or "torch" in found, "torch alone brings libraries of NVIDIA"


@pytest.mark.parametrize(("lock", "extra"), [("run", ""), ("gcs", "gcs"), ("prepare", "prepare"), ("ray", "ray")])
def test_the_dependencies_of_the_project_are_locked(lock: str, extra: str) -> None:
    found = {**pinned(ROOT / f"requirements/{lock}.txt"), **pinned(ROOT / "requirements/torch-cpu.txt")}
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"].get(extra, []):
        requirement = Requirement(text)
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), "renew it by: make lock"
