from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from fusion import storage
from fusion.errors import ConfigError, CredentialsError, DataError, UnreachableError
from tests.conftest import BUCKET, start_s3
from tests.s3_server import READER_KEY, READER_SECRET, WRITER_KEY, WRITER_SECRET
from tests.services import require


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("bucket"))


def test_what_is_written_is_read(place: str) -> None:
    url = storage.join(place, "a", "b", "object")
    assert not storage.exists(url)
    storage.write(url, b"first")
    storage.write(url, b"second")
    assert storage.exists(url)
    assert storage.read(url) == b"second"
    with storage.open_read(url) as file:
        file.seek(3)
        assert file.read(2) == b"on"


def test_ls_lists_what_is_directly_below(place: str) -> None:
    for name in ("runs/b/x", "runs/a/x", "runs/c"):
        storage.write(storage.join(place, name), b"1")
    assert storage.ls(storage.join(place, "runs")) == [storage.join(place, "runs", name) for name in "abc"]
    assert storage.ls(storage.join(place, "nothing")) == []


def test_a_missing_object_is_named(place: str) -> None:
    url = storage.join(place, "missing.csv")
    with pytest.raises(DataError, match=r"missing\.csv does not exist"):
        storage.read(url)


def test_a_missing_bucket(bucket: str) -> None:
    with pytest.raises(DataError, match="s3://no-such-bucket/x"):
        storage.read("s3://no-such-bucket/x")
    with pytest.raises(DataError, match="s3://no-such-bucket/x"):
        storage.write("s3://no-such-bucket/x", b"")


@pytest.mark.parametrize(("key", "secret"), [(WRITER_KEY, "wrong"), ("unknown", WRITER_SECRET)])
def test_wrong_credentials(bucket: str, key: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, key, secret)
    for action in (lambda: storage.read(f"{bucket}/x"), lambda: storage.write(f"{bucket}/x", b"")):
        with pytest.raises(CredentialsError, match=bucket):
            action()


def test_no_credentials_at_all(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(CredentialsError, match=bucket):
        storage.write(f"{bucket}/x", b"")


def test_a_reader_may_not_write(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(f"{bucket}/x", b"1")
    _use(monkeypatch, READER_KEY, READER_SECRET)
    assert storage.read(f"{bucket}/x") == b"1"
    with pytest.raises(CredentialsError, match="no access"):
        storage.write(f"{bucket}/x", b"2")


def test_a_stopped_server_is_unreachable_and_a_restarted_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, bucket = start_s3(tmp_path), f"s3://{BUCKET}"  # of its own: a restarted server grants its writer more
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        storage.write(f"{bucket}/x", b"1")
        monkeypatch.setattr(storage, "_patience", 0.5)
        server.stop()
        with pytest.raises(UnreachableError, match="/x does not answer"):
            storage.read(f"{bucket}/x")
        server.start()
        monkeypatch.setattr(storage, "_patience", 30)
        assert storage.read(f"{bucket}/x") == b"1"
    finally:
        server.stop()


def _use(monkeypatch: pytest.MonkeyPatch, key: str, secret: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_an_object_is_created_once(place: str) -> None:
    url = storage.join(place, "deep", "lock")
    assert storage.create(url, b"first")
    assert storage.create(url, b"first")  # the same bytes: perhaps an answer was lost
    assert not storage.create(url, b"second")
    assert storage.read(url) == b"first"


def test_an_object_is_replaced_only_by_who_knows_its_version(place: str) -> None:
    url = storage.join(place, "pointer")
    assert storage.read_version(url) is None
    storage.write(url, b"1")
    before = storage.read_version(url)
    assert before is not None and before[0] == b"1"
    assert storage.replace(url, b"2", before[1])
    assert not storage.replace(url, b"3", before[1])
    assert storage.read(url) == b"2"
    storage.remove(url)
    assert not storage.exists(url)
    storage.remove(url)


def test_of_many_writers_one_wins(place: str) -> None:
    url = storage.join(place, "race")
    storage.write(url, b"start")
    version = storage.read_version(url)
    assert version is not None
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.replace(url, b"%d" % i, version[1]), range(8)))
        created = list(pool.map(lambda i: storage.create(f"{url}2", b"%d" % i), range(8)))
    assert sum(won) == sum(created) == 1


def test_conditions_are_honoured_and_a_store_without_them_is_found_out(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage.honours_conditions(place)
    assert storage.ls(place) == []
    monkeypatch.setattr(storage, "_conditionally", lambda put: True)
    monkeypatch.setattr(storage, "_create", lambda url, data: True)
    assert not storage.honours_conditions(place)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    require(subprocess.run(mount, check=False, capture_output=True).returncode == 0, "the right to mount")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_and_a_read_only_one_are_no_bugs(tiny_disk: Path) -> None:
    storage.write(f"{tiny_disk}/x", b"before")
    with pytest.raises(UnreachableError, match="no space is left for "):
        storage.write(f"{tiny_disk}/x", bytes(100_000))
    assert storage.read(f"{tiny_disk}/x") == b"before"
    assert [path.name for path in tiny_disk.iterdir()] == ["x"]
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(CredentialsError, match=r"no access to .*Read-only file system"):
        storage.write(f"{tiny_disk}/x", b"1")


def test_a_store_that_ignores_conditions_is_found_out(bucket: str, tmp_path: Path) -> None:
    assert storage.honours_conditions(bucket) and storage.honours_conditions(str(tmp_path))
    assert not storage.honours_conditions("memory://somewhere")


def test_a_store_whose_package_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"gs://bucket/x cannot be opened: .*gcsfs"):
        storage.read("gs://bucket/x")
    with pytest.raises(ConfigError, match="nosuch://x cannot be opened: Protocol not known"):
        storage.read("nosuch://x")
