"""Stores and file systems that lack an operation: one warning, and Fusion goes on without it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fsspec
import pytest

from fusion import storage
from fusion.errors import ConfigError
from fusion.jobs import doctor
from fusion.records.attempts import take_lease
from fusion.records.run import RunFolder
from fusion.storage import backend
from tests.plain_s3 import BUCKET, PlainS3

PLACE = f"s3://{BUCKET}/out"
CONDITIONS = ("if-none-match", "if-match")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainS3]:
    server = PlainS3()
    settings = {"AWS_ENDPOINT_URL_S3": server.endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield server
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_unsupported", set())


def refusing(
    names: tuple[str, ...], status: int, code: str
) -> Callable[[str, Mapping[str, str]], tuple[int, str] | None]:
    """Answers so to every request that has one of these headers."""
    return lambda method, headers: (status, code) if any(name in headers for name in names) else None


def works_for_one_writer(root: str) -> None:
    """Creating, replacing, and noticing what is there, as all callers rely on it."""
    url = storage.join(root, "pointer")
    assert storage.create(url, b"1") and not storage.create(url, b"2")
    held = storage.read_version(url)
    assert held is not None and held[0] == b"1"
    assert storage.replace(url, b"2", held[1]) and not storage.replace(url, b"3", held[1])
    assert storage.read(url) == b"2"
    run = storage.join(root, "run")
    assert [take_lease(RunFolder(run)).attempt, take_lease(RunFolder(run)).attempt] == [1, 2]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (501, "NotImplemented: A header you provided implies functionality that is not implemented"),
        (405, "MethodNotAllowed"),
        (400, "InvalidArgument: If-None-Match and If-Match are not supported"),
    ],
)
def test_a_store_that_refuses_conditions(
    status: int, code: str, plain: PlainS3, capfd: pytest.CaptureFixture[str]
) -> None:
    plain.refuse = refusing(CONDITIONS, status, code)
    assert not storage.honours_conditions(PLACE)
    works_for_one_writer(PLACE)
    (said,) = capfd.readouterr().err.splitlines()
    assert " warning " in said and 'event=store_lacks operation="conditional writes"' in said


def test_a_store_that_refuses_conditions_and_was_not_probed(plain: PlainS3) -> None:
    plain.refuse = refusing(CONDITIONS, 501, "NotImplemented")
    works_for_one_writer(PLACE)


def test_a_store_that_ignores_conditions(plain: PlainS3, capfd: pytest.CaptureFixture[str]) -> None:
    assert not storage.honours_conditions(PLACE) and not storage.honours_conditions(PLACE)
    works_for_one_writer(PLACE)
    assert capfd.readouterr().err.count("event=store_lacks") == 1


@pytest.mark.parametrize(
    ("header", "code", "status", "variable"),
    [
        ("x-amz-sdk-checksum-algorithm", "NotImplemented", 501, "AWS_REQUEST_CHECKSUM_CALCULATION"),
        ("x-amz-checksum-crc32", "InvalidArgument: Unsupported header 'x-amz-checksum-crc32'", 400,
            "AWS_REQUEST_CHECKSUM_CALCULATION"),
        ("x-amz-checksum-mode", "NotImplemented", 501, "AWS_RESPONSE_CHECKSUM_VALIDATION"),
        ("x-amz-checksum-mode", "InvalidArgument: Unsupported header x-amz-checksum-mode", 400,
            "AWS_RESPONSE_CHECKSUM_VALIDATION"),
    ],
)  # fmt: skip
def test_a_store_that_refuses_checksums(
    header: str, code: str, status: int, variable: str, plain: PlainS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.refuse = refusing((header,), status, code)
    plain.objects["out/x"] = b"1"
    act = storage.read if "RESPONSE" in variable else lambda url: storage.create(f"{url}2", b"1")
    with pytest.raises(ConfigError) as caught:
        act(f"{PLACE}/x")
    assert f"{variable}=when_required" in caught.value.remedy
    monkeypatch.setenv(variable, "when_required")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    act(f"{PLACE}/x")
    assert storage.honours_conditions(PLACE) is False  # the only defect of this store is that it ignores conditions


def failing(number: int) -> Callable[..., None]:
    """Stands for a call of the system that this file system does not have."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EMLINK])
def test_a_file_system_without_hard_links(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    works_for_one_writer(str(tmp_path))
    assert storage.honours_conditions(str(tmp_path)), "the folder's lock tells two writers of this machine apart"
    assert capfd.readouterr().err.count('event=store_lacks operation="hard links"') == 1
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    works_for_one_writer(str(tmp_path))
    monkeypatch.setattr(os, "link", failing(errno.EOPNOTSUPP))  # SMB has neither
    works_for_one_writer(str(tmp_path / "smb"))
    assert capfd.readouterr().err.count("event=store_lacks operation=locks") == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_fsync(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    works_for_one_writer(str(tmp_path))


def test_a_removed_object_is_not_replaced(tmp_path: Path, bucket: str) -> None:
    for root in (str(tmp_path), bucket):
        url = storage.join(root, "x")
        storage.write(url, b"1")
        held = storage.read_version(url)
        assert held is not None
        storage.remove(url)
        assert not storage.replace(url, b"2", held[1])


def test_doctor_warns_of_a_store_without_conditions(plain: PlainS3, capsys: pytest.CaptureFixture[str]) -> None:
    plain.refuse = refusing(CONDITIONS, 501, "NotImplemented")
    assert doctor.main(["--only", "store", "writable", "conditions", "--output", PLACE]) == 0
    said = capsys.readouterr().out
    assert "ok   writable " in said and "warn conditions   the store has no conditional writes" in said
    assert plain.objects == {}


def test_doctor_warns_of_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    assert doctor.main(["--only", "conditions", "--output", str(tmp_path)]) == 0
    assert "warn conditions   the store has no locks" in capsys.readouterr().out
