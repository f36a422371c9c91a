"""A store that resets, refuses, dawdles, lies about lengths or goes away: commands get through, or end and go on."""

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

OUTAGE = 20.0  # seconds
DATE = "2026-01-02"
FLAGS = ["--run-id", "r", *SMALL, "--epochs", "3", "--checkpoint-steps", "3", "--keep", "2"]
TRAIN = "fusion.all_embeddings.train"


@dataclass
class Place:
    """A catalog in a bucket behind a proxy, and the commands on it."""

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
        """Everything under the output, read from the server itself, past the proxy's faults."""
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
                with suppress(client.exceptions.NoSuchKey):  # pruned since it was listed
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
    """Files that a manifest promises and that are not there, whole."""
    wrong = []
    for key in filter(_is_one, objects):
        for entry in json.loads(objects[key])["files"]:
            name = key.replace(manifests.MANIFEST, entry["key"])
            if hashlib.sha256(objects.get(name, b"")).hexdigest() != entry["sha256"]:
                wrong.append(name)
    return wrong


@contextmanager
def watched(place: Place) -> Iterator[None]:
    """Verifies every manifest again and again while commands run and at the end, as any reader of the bucket could."""
    done, seen = threading.Event(), list[list[str]]()

    def watch() -> None:
        while not done.wait(1):
            seen.append(lasting(place, damaged(place.objects())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not any([*seen, damaged(place.objects())])


def lasting(place: Place, wrong: list[str]) -> list[str]:
    """Those of the damaged files whose manifest still stands: a checkpoint that is pruned loses it first."""
    names = {name.rsplit("/", 1)[0] for name in place.objects() if _is_one(name)} if wrong else set()
    return [name for name in wrong if name.rsplit("/", 1)[0] in names]


@pytest.fixture
def place(bucket: str, s3: S3Server, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    upload(catalog, bucket)
    _server[:] = [s3]
    proxy = FaultProxy(s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    yield Place(bucket, proxy)
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
    """A checkpoint's manifest is being written: training is on its way."""
    return request.method == "PUT" and "/checkpoints/" in request.path and _is_one(request.path)


def check_two_lines(said: str, expected: str) -> None:
    assert "Traceback" not in said
    assert [line.split(":")[0] for line in said.splitlines()[-2:]] == ["error", "hint"], said
    assert expected in said.splitlines()[-2]


def until_done(place: Place, command: str) -> int:
    """Runs a command again while it ends with an error that says so; how often it ran."""
    for n in range(1, 6):
        code = place.train() if command == "train" else place.predict()
        if code == 0:
            return n
        assert code in (69, 77)
    raise AssertionError(f"{command} got nowhere")


SHARES: dict[str, tuple[float, tuple[Fault, ...]]] = {
    "resets": (0.15, RESETS),
    "503 and 500": (0.15, (Fault.SLOW_DOWN, Fault.INTERNAL)),
    "delays": (0.15, (Fault.DELAY,)),
    "truncated": (0.15, (Fault.TRUNCATE,)),
}


@pytest.mark.parametrize("kind", SHARES)
def test_a_share_of_requests_fails(kind: str, place: Place, undisturbed: tuple[bytes, bytes]) -> None:
    share, faults = SHARES[kind]
    place.proxy.plan = at_random(share, faults, seed=len(kind))
    with watched(place):
        assert (until_done(place, "train"), until_done(place, "predict")) == (1, 1)
    assert all(place.proxy.met[fault] for fault in faults)
    assert place.results() == undisturbed


def test_with_little_patience_it_ends_and_goes_on(
    place: Place, undisturbed: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    place.patience, place.proxy.plan = "0", at_random(0.03, RESETS, seed=2)
    with watched(place):
        codes = [place.train() for _ in range(2)]
    assert set(codes) <= {0, 69} and 69 in codes
    assert "Traceback" not in capsys.readouterr().err
    place.proxy.plan = None
    assert (place.train(), place.predict()) == (0, 0)
    assert place.results() == undisturbed


def test_an_outage_is_waited_out(place: Place, undisturbed: tuple[bytes, bytes]) -> None:
    place.proxy.plan = once(is_commit, outage(OUTAGE))
    with watched(place):
        assert place.train() == 0
    assert place.proxy.met[Fault.RESET_BEFORE] > 2
    assert place.predict() == 0
    assert place.results() == undisturbed


def test_an_outage_longer_than_the_patience(place: Place, s3: S3Server, undisturbed: tuple[bytes, bytes]) -> None:
    place.patience, place.proxy.plan = "1", once(is_commit, always(Fault.RESET_BEFORE))
    env = s3.environment() | {"AWS_ENDPOINT_URL_S3": place.proxy.endpoint}
    ended = run_command(TRAIN, *place.where, *FLAGS, env=env)
    assert ended.code == 69
    check_two_lines(ended.err, "does not answer")
    place.proxy.plan = None
    assert (place.train(), place.predict()) == (0, 0)
    assert place.results() == undisturbed


@pytest.mark.parametrize("fault", [Fault.EXPIRED, Fault.DENIED])
def test_credentials_that_expire(
    fault: Fault, place: Place, undisturbed: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    n_commits = iter(range(100))
    place.proxy.plan = once(lambda request: is_commit(request) and next(n_commits) == 2, always(fault))
    assert place.train() == 77
    check_two_lines(capsys.readouterr().err, "no access to s3://")
    assert place.predict() == 77
    check_two_lines(capsys.readouterr().err, "no access to s3://")
    place.proxy.plan = None
    assert not damaged(place.objects())
    assert (place.train(), place.predict()) == (0, 0)
    assert "event=resumed" in capsys.readouterr().err
    assert place.results() == undisturbed


def test_a_flipped_bit_in_the_store(
    place: Place, undisturbed: tuple[bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    n_commits = iter(range(100))
    place.proxy.plan = once(lambda request: is_commit(request) and next(n_commits) == 2, always(Fault.DENIED))
    assert place.train() == 77
    place.proxy.plan = None
    newest = RunFolder(place.run).checkpoints()[-1]
    _flip(storage.join(newest.url, manifests.MODEL))
    capsys.readouterr()
    assert place.train() == 0
    said = capsys.readouterr().err
    assert f"event=checkpoint_damaged checkpoint={newest.url}" in said
    best = RunFolder(place.run).best()
    assert place.predict() == 0
    assert place.results() == undisturbed
    (submission,) = (key for key in place.objects() if key.endswith("submission.csv"))
    _flip(f"s3://{BUCKET}/{submission}")
    assert place.predict() == 0
    assert place.results() == undisturbed, "made again"
    _flip(f"s3://{BUCKET}/{submission}")
    _flip(storage.join(best.url, manifests.MODEL))
    assert place.predict() == 65
    check_two_lines(capsys.readouterr().err, "model.safetensors is damaged: sha256")


def _flip(url: str) -> None:
    content = bytearray(storage.read(url))
    content[len(content) // 2] ^= 1
    storage.write(url, bytes(content))


def test_a_stalled_answer_is_given_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend._S3["config_kwargs"], "read_timeout", 1)
    monkeypatch.setattr(storage, "_patience", 0.5)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    place.proxy.plan = always(Fault.STALL)
    for action in (lambda: storage.read(f"{place.url}/train.csv"), lambda: storage.write(f"{place.url}/x", b"1")):
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="does not answer"):
            action()
        assert time.monotonic() - started < 12  # the proxy stalls for 300 s, and the client would wait 15 s each time
    place.proxy.plan = None
    storage.write(f"{place.url}/x", b"1")
    assert storage.read(f"{place.url}/x") == b"1"


def test_a_large_file_is_read_on_from_where_it_broke_off(place: Place) -> None:
    url, content = f"{place.url}/large", bytes(range(256)) * 4096
    storage.write(url, content)
    place.proxy.plan = at_random(0.4, (*RESETS, Fault.TRUNCATE), seed=3)
    with storage.open_read(url) as file:
        parts = b"".join(iter(lambda: file.read(1 << 16), b""))
    assert parts == content
    assert place.proxy.met[None] < 40


def test_the_proxy_alone_changes_nothing(place: Place) -> None:
    storage.write(f"{place.url}/x", b"12")
    assert storage.read(f"{place.url}/x") == b"12"
    assert set(place.proxy.met) == {None}
