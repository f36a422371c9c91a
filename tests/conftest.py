"""Fixtures and functions for all tests: a small catalog, settings of a small model, a real S3 server, and commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import boto3
import fsspec
import pytest

from fusion import environment, storage
from fusion.demo.catalog import generate
from tests import fork_server
from tests.s3_server import KEY, SECRET, S3Server

environment.prepare_libraries()  # nothing above loads torch
os.environ["OMP_NUM_THREADS"] = "1"  # in every process, because the number of threads affects how sums are rounded

DIMS = {"clip_image": 12, "siglip_image": 10, "siglip_text": 8, "qwen_text": 14}
BUCKET = "fusion-tests"
SMALL = ["--width", "16", "--hidden", "16", "8", "--batch-size", "64", "--lr", "0.01"]
SMALL += ["--device", "cpu"]

# Test files that take minutes, longest first. They are started first: at the end, one process would run such a file
# while the others are idle.
LONG = ["test_slurm", "test_slurm_outside", "test_resume", "test_exit_codes", "test_ensemble", "test_faults"]
LONG += ["test_rendezvous", "test_errors", "test_verify_everything", "test_resumable", "test_end_to_end", "test_ranks"]
LONG += ["test_quality", "test_leaks", "test_blocks"]


def pytest_configure() -> None:
    """Restores the handler of SIGINT: shells ignore it in background jobs, and child processes would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the long files to the front; the order of tests within a file stays."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@dataclass(frozen=True)
class Done:
    """The exit code and output of a command that has ended."""

    code: int
    out: str
    err: str


def run_command(
    *arguments: str, env: Mapping[str, str] | None = None, ranks: int = 0, new_python: bool = False
) -> Done:
    """Runs `python -m …`, or `torchrun … -m …` when `ranks` are given.

    Args:
        new_python: starts Python, instead of a process that has loaded libraries before it gets `env`; see
            `fork_server`. botocore, for example, looks up HOME when it is loaded.
    """
    if ranks:
        where = ["--nproc-per-node", str(ranks), "--master-port=0", "--standalone"]
        arguments = ("torch.distributed.run", *where, "-m", *arguments)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FUSION_", "AWS_"))}
    environment = {**clean, "OMP_NUM_THREADS": "1", **(env or {})}
    if new_python:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    else:
        done = fork_server.run(*arguments, env=environment)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated catalog of 603 products. Tests that change it must copy it first."""
    folder = tmp_path_factory.mktemp("catalog")
    generate(folder, n_products=603, dims=DIMS)
    return folder


@pytest.fixture(scope="session", autouse=True)
def unmeasured_commands() -> None:
    """Lets coverage measure the tests' own processes and not the commands that they run, which it slows by half."""
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def usual_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets the store timeout, which commands in this process may have changed, to its default."""
    monkeypatch.setattr(storage, "_patience", 60.0)


def start_s3(folder: Path) -> S3Server:
    """Starts a server with the bucket of the tests. The caller must stop it."""
    server = S3Server(folder)
    where = {"endpoint_url": server.endpoint, "aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    boto3.client("s3", region_name="us-east-1", **where).create_bucket(Bucket=BUCKET)
    return server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = start_s3(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """URL of an empty folder in a bucket, for which the environment of the test has credentials.

    All tests use the same bucket, because the server reserves disk space per bucket.
    """
    for key, value in s3.environment().items():
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    folder = "".join(letter if letter.isalnum() else "-" for letter in request.node.nodeid.split("/")[-1])
    return f"s3://{BUCKET}/{folder}"


def upload(folder: Path, url: str) -> None:
    """Uploads all files below a folder to a URL in the bucket."""
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            boto3.client("s3").upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
