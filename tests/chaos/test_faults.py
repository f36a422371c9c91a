"""A store that resets connections, returns errors, is slow, truncates answers or disappears for a while.

Commands succeed nevertheless, or end with an error and succeed when they are started again.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import boto3
import fsspec
import pytest

from fusion import storage
from fusion.all_embeddings import predict_test, train
from fusion.errors import UnreachableError
from fusion.records import manifests
from fusion.records.run import RunFolder
from fusion.storage import backend
from tests.conftest import BUCKET, SMALL, run_command, upload
from tests.fault_proxy import RESETS, Fault, FaultProxy, Request, always, at_random, once, outage
from tests.s3_server import S3Server

OUTAGE = 20.0  # seconds; shorter than --store-timeout (60 s), and longer than several retries
DATE = "2026-01-02"
FLAGS = ["--run-id", "r", *SMALL, "--epochs", "3", "--checkpoint-steps", "3", "--keep", "2"]
TRAIN = "fusion.all_embeddings.train"


@dataclass
class FaultyStore:
    """A catalog in a bucket behind a proxy that injects faults, and the commands that read and write there."""

    url: str
    proxy: FaultProxy
    patience: str = "60"

    @property
    def where(self) -> list[str]:
        return ["--output", f"{self.url}/out", "--data", self.url, "--store-timeout", self.patience]

    @property
    def run(self) -> str:
        return f"{self.url}/out/runs/r"

    def train(self) -> int:
        return train.main([*self.where, *FLAGS])

    def predict(self) -> int:
        return predict_test.main([*self.where, "--run-id", "r", "--date", DATE])

    def objects(self) -> dict[str, bytes]:
        """All objects under the output, read without the proxy."""
        return dict(_objects(f"{self.url}/out".removeprefix(f"s3://{BUCKET}/")))

    def results(self) -> tuple[bytes, bytes]:
        """The final model and the submission, as they are stored."""
        found = self.objects()
        stated = {key: json.loads(data) for key, data in found.items() if "/checkpoints/" in key and _is_one(key)}
        (final,) = [key for key, manifest in stated.items() if manifest["finished"]]
        (submission,) = [data for key, data in found.items() if key.endswith("submission.csv")]
        return found[final.replace(manifests.MANIFEST, manifests.MODEL)], submission


def _objects(prefix: str) -> Iterator[tuple[str, bytes]]:
    with _direct() as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
            for entry in page.get("Contents", []):
                with suppress(client.exceptions.NoSuchKey):  # it was pruned after the listing
                    yield entry["Key"], client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()


_server: list[S3Server] = []


@contextmanager
def _direct() -> Iterator[boto3.client]:
    client = boto3.client("s3", endpoint_url=_server[-1].endpoint)
    try:
        yield client
    finally:
        client.close()


def _is_one(key: str) -> bool:
    return key.endswith(f"/{manifests.MANIFEST}")


def damaged(objects: dict[str, bytes]) -> list[str]:
    """Files that are missing or differ from their manifest."""
    wrong = []
    for key in filter(_is_one, objects):
        for entry in json.loads(objects[key])["files"]:
            name = key.replace(manifests.MANIFEST, entry["key"])
            if hashlib.sha256(objects.get(name, b"")).hexdigest() != entry["sha256"]:
                wrong.append(name)
    return wrong


@contextmanager
def watched(store: FaultyStore) -> Iterator[None]:
    """Verifies all manifests once per second while commands run, and at the end, as any reader of the bucket could."""
    done, seen = threading.Event(), list[list[str]]()

    def watch() -> None:
        while not done.wait(1):
            seen.append(lasting(store, damaged(store.objects())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not any([*seen, damaged(store.objects())])


def lasting(store: FaultyStore, wrong: list[str]) -> list[str]:
    """The damaged files whose manifest still exists. When a checkpoint is pruned, its manifest is removed first."""
    names = {name.rsplit("/", 1)[0] for name in store.objects() if _is_one(name)} if wrong else set()
    return [name for name in wrong if name.rsplit("/", 1)[0] in names]


@pytest.fixture
def store(bucket: str, s3: S3Server, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    upload(catalog, bucket)
    _server[:] = [s3]
    proxy = FaultProxy(s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    yield FaultyStore(bucket, proxy)
    proxy.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def undisturbed(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    output = tmp_path_factory.mktemp("undisturbed")
    where = ["--output", str(output)]
    assert train.main([*where, "--data", str(catalog), *FLAGS]) == 0
    assert predict_test.main([*where, "--run-id", "r", "--date", DATE]) == 0
    model = RunFolder(str(output / "runs/r")).checkpoints()[-1].url
    return Path(model, manifests.MODEL).read_bytes(), next(output.rglob("submission.csv")).read_bytes()


def is_commit(request: Request) -> bool:
    """Whether the request writes the manifest of a checkpoint."""
    return request.method == "PUT" and "/checkpoints/" in request.path and _is_one(request.path)


def check_two_lines(said: str, expected: str) -> None:
    assert "Traceback" not in said
    assert [line.split(":")[0] for line in said.splitlines()[-2:]] == ["error", "hint"], said
    assert expected in said.splitlines()[-2]


def until_done(store: FaultyStore, command: str) -> int:
    """Runs a command until it ends with 0, at most five times; returns how often it ran."""
    for n in range(1, 6):
        code = store.train() if command == "train" else store.predict()
        if code == 0:
            return n
        assert code in (69, 77)
    raise AssertionError(f"{command} failed five times")


SHARES: dict[str, tuple[float, tuple[Fault, ...]]] = {
    "resets": (0.15, RESETS),
    "503 and 500": (0.15, (Fault.SLOW_DOWN, Fault.INTERNAL)),
    "delays": (0.15, (Fault.DELAY,)),
    "truncated": (0.15, (Fault.TRUNCATE,)),
}


@pytest.mark.parametrize("kind", SHARES)
def test_commands_succeed_when_a_share_of_requests_fails(
    kind: str, store: FaultyStore, undisturbed: tuple[bytes, bytes]
) -> None:
    share, faults = SHARES[kind]
    store.proxy.plan = at_random(share, faults, seed=len(kind))
    with watched(store):
        assert (until_done(store, "train"), until_done(store, "predict")) == (1, 1)
    assert all(store.proxy.met[fault] for fault in faults)
    assert store.results() == undisturbed


def test_a_training_without_retries_fails_and_resumes(
    store: FaultyStore, undisturbed: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    store.patience, store.proxy.plan = "0", at_random(0.03, RESETS, seed=2)
    with watched(store):
        codes = [store.train() for _ in range(2)]
    assert set(codes) <= {0, 69} and 69 in codes
    assert "Traceback" not in capsys.readouterr().err
    store.proxy.plan = None
    assert (store.train(), store.predict()) == (0, 0)
    assert store.results() == undisturbed


def test_a_training_survives_a_short_outage(store: FaultyStore, undisturbed: tuple[bytes, bytes]) -> None:
    store.proxy.plan = once(is_commit, outage(OUTAGE))
    with watched(store):
        assert store.train() == 0
    assert store.proxy.met[Fault.RESET_BEFORE] > 2
    assert store.predict() == 0
    assert store.results() == undisturbed


def test_an_outage_longer_than_the_store_timeout_ends_with_69(
    store: FaultyStore, s3: S3Server, undisturbed: tuple[bytes, bytes]
) -> None:
    store.patience, store.proxy.plan = "1", once(is_commit, always(Fault.RESET_BEFORE))
    env = s3.environment() | {"AWS_ENDPOINT_URL_S3": store.proxy.endpoint}
    ended = run_command(TRAIN, *store.where, *FLAGS, env=env)
    assert ended.code == 69
    check_two_lines(ended.err, "does not answer")
    store.proxy.plan = None
    assert (store.train(), store.predict()) == (0, 0)
    assert store.results() == undisturbed


@pytest.mark.parametrize("fault", [Fault.EXPIRED, Fault.DENIED])
def test_expired_credentials_end_with_77_and_the_training_resumes(
    fault: Fault, store: FaultyStore, undisturbed: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    n_commits = iter(range(100))
    store.proxy.plan = once(lambda request: is_commit(request) and next(n_commits) == 2, always(fault))
    assert store.train() == 77
    check_two_lines(capsys.readouterr().err, "no access to s3://")
    assert store.predict() == 77
    check_two_lines(capsys.readouterr().err, "no access to s3://")
    store.proxy.plan = None
    assert not damaged(store.objects())
    assert (store.train(), store.predict()) == (0, 0)
    assert "event=resumed" in capsys.readouterr().err
    assert store.results() == undisturbed


def test_a_flipped_bit_in_the_store_is_detected(
    store: FaultyStore, undisturbed: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    n_commits = iter(range(100))
    store.proxy.plan = once(lambda request: is_commit(request) and next(n_commits) == 2, always(Fault.DENIED))
    assert store.train() == 77
    store.proxy.plan = None
    newest = RunFolder(store.run).checkpoints()[-1]
    _flip(newest.at(manifests.MODEL))
    capsys.readouterr()
    assert store.train() == 0
    said = capsys.readouterr().err
    assert f"event=checkpoint_damaged checkpoint={newest.url}" in said
    best = RunFolder(store.run).best()
    assert store.predict() == 0
    assert store.results() == undisturbed
    (submission,) = (key for key in store.objects() if key.endswith("submission.csv"))
    _flip(f"s3://{BUCKET}/{submission}")
    assert store.predict() == 0
    assert store.results() == undisturbed, "the damaged submission was not made again"
    _flip(f"s3://{BUCKET}/{submission}")
    _flip(best.at(manifests.MODEL))
    assert store.predict() == 65
    check_two_lines(capsys.readouterr().err, "model.safetensors is damaged: sha256")


def _flip(url: str) -> None:
    content = bytearray(storage.read(url))
    content[len(content) // 2] ^= 1
    storage.write(url, bytes(content))


def test_a_stalled_answer_times_out(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.S3_SETTINGS["config_kwargs"], "read_timeout", 1)
    monkeypatch.setattr(storage, "_patience", 0.5)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    store.proxy.plan = always(Fault.STALL)
    for action in (lambda: storage.read(f"{store.url}/train.csv"), lambda: storage.write(f"{store.url}/x", b"1")):
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="does not answer"):
            action()
        assert time.monotonic() - started < 12  # the proxy stalls for 300 s, and the client would wait 15 s each time
    store.proxy.plan = None
    storage.write(f"{store.url}/x", b"1")
    assert storage.read(f"{store.url}/x") == b"1"


def test_reading_a_large_file_resumes_after_a_broken_connection(store: FaultyStore) -> None:
    url, content = f"{store.url}/large", bytes(range(256)) * 4096
    storage.write(url, content)
    store.proxy.plan = at_random(0.4, (*RESETS, Fault.TRUNCATE), seed=3)
    with storage.open_read(url) as file:
        parts = b"".join(iter(lambda: file.read(1 << 16), b""))
    assert parts == content
    assert store.proxy.met[None] < 40


def test_the_proxy_alone_changes_nothing(store: FaultyStore) -> None:
    storage.write(f"{store.url}/x", b"12")
    assert storage.read(f"{store.url}/x") == b"12"
    assert set(store.proxy.met) == {None}
