"""Builds the project's image from the real Dockerfile with buildah, also where no registry can be reached.

    python -m tests.image.engine        builds localhost/fusion:test and prints how long that took

FUSION_TEST_BASE names another base image, FUSION_TEST_TORCH_INDEX another index of torch wheels ("": pip's own).
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/fusion:test"
STAND_IN = "localhost/stand-in-for-python:3.11-bookworm"
PACKAGES = ("podman", "buildah", "runc", "netavark", "catatonit", "debootstrap")
TOOLS = ("podman", "buildah", "runc")


def environment() -> dict[str, str]:
    """The environment for podman and buildah, with the settings in containers.conf beside this file."""
    return {**os.environ, "CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf"))}


def podman(*arguments: str, errors: bool = False) -> str:
    """Runs podman and returns its output, with `errors` also its standard error; raises AssertionError if it fails."""
    done = subprocess.run(["podman", *arguments], check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"podman {' '.join(arguments)} ended with {done.returncode}: {done.stderr}"
    return done.stdout + done.stderr * errors


def available() -> bool:
    """Whether podman and buildah are installed. As root on Debian, tries to install them first."""
    if not _installed() and os.geteuid() == 0 and shutil.which("apt-get"):
        install(*PACKAGES)
    return _installed()


def install(*packages: str) -> None:
    """Installs packages of Debian, as root."""
    _apt("update")
    _apt("install", "--yes", "--no-install-recommends", *packages)


def _installed() -> bool:
    return all(shutil.which(tool) for tool in TOOLS)


def _apt(*arguments: str) -> None:
    unattended = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(
        ["apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=600", "-o", "Acquire::Retries=3", *arguments],
        check=False,
        stdout=sys.stderr,
        env=unattended,
    )


def build() -> str:
    """Builds the image as `make image` does, and returns its name."""
    code, said = make_image(ROOT, IMAGE)
    assert code == 0, said
    return IMAGE


def make_image(folder: Path, name: str, *flags: str) -> tuple[int, str]:
    """Runs `make image` in a folder; returns its exit code and its output."""
    with tempfile.TemporaryDirectory() as settings:
        # chroot, because within a container build steps may not be allowed to create namespaces
        flags = ("--isolation", "chroot", "--network", "host", "--layers", *_pip_settings(Path(settings)), *flags)
        variables = ["BUILDER=buildah", f"BASE={base()}", f"IMAGE={name}"]
        command = ["make", "image", *variables, f"IMAGE_FLAGS={' '.join((*flags, *_torch_index()))}"]
        done = subprocess.run(
            command,
            cwd=folder,
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
    return done.returncode, done.stdout


def base() -> str:
    """The base image of the Dockerfile if it can be pulled, else one made of Debian with its Python of that version."""
    if given := os.environ.get("FUSION_TEST_BASE"):
        return given
    found = re.search(r"^ARG BASE=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found, "the Dockerfile has no ARG BASE"
    if not podman("images", "--quiet", STAND_IN):
        if _pulled(found[1]):
            return found[1]
        _make_stand_in()
    return STAND_IN


def _pulled(name: str) -> bool:
    return not subprocess.run(["podman", "pull", name], check=False, stdout=sys.stderr, env=environment()).returncode


def _make_stand_in() -> None:
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    with tempfile.TemporaryDirectory() as folder:
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(["podman", "import", "-", STAND_IN], check=True, stdin=tar.stdout, env=environment())


def _pip_options() -> dict[str, str]:
    """Settings of this machine's pip, such as `index-url` and `cert`; variables take precedence over its files."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    settings = dict(line.split("=", 1) for line in lines)
    return {
        name.removeprefix(f"{section}."): ast.literal_eval(value)
        for section in ("global", "install", ":env:")
        for name, value in settings.items()
        if name.startswith(f"{section}.")
    }


def _pip_settings(folder: Path) -> list[str]:
    """Flags of buildah that mount this machine's settings of pip into the build, and the files that they name."""
    options = _pip_options()
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {' '.join(value.split())}\n" for key, value in options.items()))
    mounts = {str(file): "/etc/pip.conf"}
    for key, value in options.items():
        for part in value.split():
            path = Path(part.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                shared = path.parent if key.endswith("index-url") else path  # an index links to files in its folder
                mounts[str(shared)] = str(shared)
    return [flag for source, target in mounts.items() for flag in ("--volume", f"{source}:{target}:ro")]


def _torch_index() -> list[str]:
    """Flags for another index of torch: the environment's, or none if pip has `find-links`; empty for the default."""
    if "FUSION_TEST_TORCH_INDEX" in os.environ:
        return ["--build-arg", f"TORCH_INDEX={os.environ['FUSION_TEST_TORCH_INDEX']}"]
    return ["--build-arg", "TORCH_INDEX="] if "find-links" in _pip_options() else []


if __name__ == "__main__":
    begun = time.monotonic()
    if not available():
        sys.exit("podman and buildah are missing; on Debian: apt-get install " + " ".join(PACKAGES))
    print(f"{build()} on {base()}, {time.monotonic() - begun:.0f} s")
