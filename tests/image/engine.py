"""Podman and buildah, and the project's image, built from the real Dockerfile also where no registry can be reached.

    python -m tests.image.engine        builds localhost/fusion:test and says how long that took

FUSION_TEST_BASE names another base image, FUSION_TEST_TORCH_INDEX another index of torch wheels ("": that of pip).
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
    """That of this process, in which podman and buildah find the settings beside this file."""
    return {**os.environ, "CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf"))}


def podman(*arguments: str, errors: bool = False) -> str:
    """What podman prints, with `errors` also on standard error; an AssertionError with its complaint where it fails."""
    done = subprocess.run(["podman", *arguments], check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"podman {' '.join(arguments)} ended with {done.returncode}: {done.stderr}"
    return done.stdout + done.stderr * errors


def available() -> bool:
    """Whether podman and buildah are here, after an attempt to install them where that is possible."""
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
    """`make image` in a folder: its exit code, and what it says."""
    with tempfile.TemporaryDirectory() as settings:
        # chroot, because a confined machine lets no build step make namespaces of its own
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
    """The base of the Dockerfile where a registry has it, else a stand-in with Debian's own Python of that version."""
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
    """Settings of this machine's pip, such as `index-url` and `cert`, from its files and, above them, environment."""
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
    """Flags that give the build what this machine's pip has: its settings as one file, and what they point to."""
    options = _pip_options()
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {' '.join(value.split())}\n" for key, value in options.items()))
    mounts = {str(file): "/etc/pip.conf"}
    for key, value in options.items():
        for part in value.split():
            path = Path(part.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                shared = path.parent if key.endswith("index-url") else path  # an index links to files beside itself
                mounts[str(shared)] = str(shared)
    return [flag for source, target in mounts.items() for flag in ("--volume", f"{source}:{target}:ro")]


def _torch_index() -> list[str]:
    """The Dockerfile's own index, unless the environment names one or pip has wheels in places of its own."""
    if "FUSION_TEST_TORCH_INDEX" in os.environ:
        return ["--build-arg", f"TORCH_INDEX={os.environ['FUSION_TEST_TORCH_INDEX']}"]
    return ["--build-arg", "TORCH_INDEX="] if "find-links" in _pip_options() else []


if __name__ == "__main__":
    begun = time.monotonic()
    if not available():
        sys.exit("podman and buildah are missing; on Debian: apt-get install " + " ".join(PACKAGES))
    print(f"{build()} on {base()}, {time.monotonic() - begun:.0f} s")
