from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from fusion import storage
from fusion.errors import ConfigError, CredentialsError, DataError, FusionError, UnreachableError
from fusion.storage import backend
from fusion.storage.ranges import RangeFile
from tests.conftest import BUCKET, start_s3
from tests.s3_server import READER_KEY, READER_SECRET, WRITER_KEY, WRITER_SECRET
from tests.services import require


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("bucket"))


def test_what_is_written_is_read(root: str) -> None:
    url = storage.join(root, "a", "b", "object")
    assert not storage.exists(url)
    storage.write(url, b"first")
    storage.write(url, b"second")
    assert storage.exists(url)
    assert storage.read(url) == b"second"
    with storage.open_read(url) as file:
        file.seek(3)
        assert file.read(2) == b"on"


def test_ls_lists_what_is_directly_below(root: str) -> None:
    for name in ("runs/b/x", "runs/a/x", "runs/c"):
        storage.write(storage.join(root, name), b"1")
    assert storage.ls(storage.join(root, "runs")) == [storage.join(root, "runs", name) for name in "abc"]
    assert storage.ls(storage.join(root, "nothing")) == []


def test_a_missing_object_is_named(root: str) -> None:
    url = storage.join(root, "missing.csv")
    with pytest.raises(DataError, match=r"(?m)missing\.csv does not exist$"):
        storage.read(url)


def test_a_missing_bucket(bucket: str) -> None:
    url = "s3://no-such-bucket/x"
    actions: list[Callable[[], object]] = [
        *(lambda act=act: act(url) for act in (storage.read, storage.read_if_exists, storage.read_version)),
        *(lambda act=act: act(url) for act in (storage.ls, storage.exists, storage.remove)),
        lambda: storage.ls("s3://no-such-bucket"),
        lambda: storage.write(url, b""),
        lambda: storage.create(url, b""),
        lambda: storage.honours_conditions(url),
    ]
    for action in actions:
        with pytest.raises(DataError, match="there is no bucket no-such-bucket"):
            action()


@pytest.mark.parametrize("name", ["xp?", "sweep[12]", "a*", "plain"])
def test_removal_takes_names_literally(name: str, root: str) -> None:
    """Also where they look like patterns, or begin like others."""
    others = ["xp1/a", "sweep1/a", "aa/a", "plain2", "plainer/a"]
    mine = [f"{name}/a", f"{name}/b/c", f"{name}/b[1]/d?"]
    for key in [*others, *mine]:
        storage.write(storage.join(root, key), key.encode())
    storage.remove(storage.join(root, name))
    assert not any(storage.exists(storage.join(root, key)) for key in mine)
    assert all(storage.read(storage.join(root, key)) == key.encode() for key in others)
    storage.remove(storage.join(root, "xp1/a"))
    assert storage.ls(storage.join(root, "xp1")) == []


def test_everything_else_takes_names_literally(root: str) -> None:
    folder = storage.join(root, "a[1]*?")
    storage.write(storage.join(root, "a1/x"), b"another")
    url = storage.join(folder, "x[y]?")
    assert not storage.exists(url) and storage.ls(folder) == [] and storage.read_if_exists(url) is None
    assert storage.create(url, b"1") and storage.exists(url) and storage.ls(folder) == [url]
    held = storage.read_version(url)
    assert held is not None and storage.replace(url, b"2", held[1]) and storage.read(url) == b"2"
    with storage.open_read(url) as file:
        assert file.read() == b"2"


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("s3:/bucket/out", "s3://bucket/out"),
        ("s3:bucket", "s3://bucket"),
        ("s3//bucket/out", "s3://bucket/out"),
        ("S3:/bucket/out", "s3://bucket/out"),
        ("gs:/bucket/out", "gs://bucket/out"),
        ("abfs:/folder", "abfs://folder"),
    ],
)
def test_rejects_misspelt_urls(url: str, meant: str) -> None:
    for action in (storage.exists, storage.ls, lambda url: storage.write(storage.join(url, "x"), b"")):
        with pytest.raises(ConfigError) as caught:
            action(url)
        assert caught.value.remedy == f"did you mean {meant}?"


def test_names_that_only_look_like_stores_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s3/x", "gs", "./s3:/x", "sources:1/x", f"file:{tmp_path}/y", "azure:x"):
        storage.write(name, b"1")
        assert storage.read(name) == b"1"


def test_an_empty_url_is_not_the_root_folder() -> None:
    for action in (storage.exists, storage.ls, storage.read, lambda url: storage.join(url, "runs")):
        with pytest.raises(ConfigError, match="the URL of a bucket or folder is empty"):
            action("")
    assert storage.join("/", "runs") == "/runs"


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text")
    for below in ("x", "runs/r/config.json"):
        with pytest.raises(ConfigError, match=r"cannot write below .*/README\.md: it is a file"):
            storage.write(f"{tmp_path}/README.md/{below}", b"")
    with pytest.raises(ConfigError, match="cannot write below /proc"):
        storage.write("/proc/x/y", b"")


def test_a_listing_contains_sizes_and_versions(root: str) -> None:
    first, second = storage.join(root, "a"), storage.join(root, "b")
    for url in (first, second, storage.join(root, "folder/c")):
        storage.write(url, b"12")
    before = storage.entries(root)
    assert [(entry.url, entry.size, entry.is_folder) for entry in before] == [
        (first, 2, False),
        (second, 2, False),
        (storage.join(root, "folder"), 0, True),
    ]
    storage.write(second, b"21")
    after = storage.entries(root)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    fs, path = backend.locate(second)
    expected = backend._file_version(os.stat(path)) if backend.is_local(fs) else backend._version(fs.info(path))
    assert after[1].version == expected


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_transient_errors_of_a_network_file_system_are_retried(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{tmp_path}/x"
    storage.write(url, b"1")
    monkeypatch.setattr(LocalFileSystem, "cat_file", stumbling(LocalFileSystem.cat_file, number, times=2))
    assert storage.read(url) == b"1"
    monkeypatch.setattr(storage, "_patience", 0.3)
    monkeypatch.setattr(LocalFileSystem, "cat_file", stumbling(LocalFileSystem.cat_file, number, times=1000))
    with pytest.raises(UnreachableError, match="/x does not answer"):
        storage.read(url)


def stumbling(action: Callable[..., bytes], number: int, times: int) -> Callable[..., bytes]:
    """Fails some times, as a server does that is starting again."""
    failures = iter(range(times))

    def act(*arguments: object, **more: object) -> bytes:
        if next(failures, None) is not None:
            raise OSError(number, os.strerror(number))
        return action(*arguments, **more)

    return act


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, UnreachableError),
        (errno.EDQUOT, UnreachableError),
        (errno.EFBIG, ConfigError),
        (errno.ENAMETOOLONG, ConfigError),
        (errno.EMFILE, ConfigError),
        (errno.EROFS, CredentialsError),
        (errno.EACCES, CredentialsError),
    ],
)
def test_errors_of_a_disk_are_not_reported_as_bugs(
    number: int, kind: type[FusionError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(kind, match=str(tmp_path)):
        storage.write(f"{tmp_path}/x", b"1")
    assert list(tmp_path.iterdir()) == []


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
    server, bucket = (
        start_s3(tmp_path),
        f"s3://{BUCKET}",
    )  # a separate server, because a restart changes the permissions of its users
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


def test_an_object_is_created_once(root: str) -> None:
    url = storage.join(root, "deep", "lock")
    assert storage.create(url, b"first")
    assert storage.create(url, b"first")  # the same bytes count as written, because an answer may have been lost
    assert not storage.create(url, b"second")
    assert storage.read(url) == b"first"


def test_an_object_is_replaced_only_with_its_current_version(root: str) -> None:
    url = storage.join(root, "pointer")
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


def test_of_many_writers_one_wins(root: str) -> None:
    url = storage.join(root, "race")
    storage.write(url, b"start")
    version = storage.read_version(url)
    assert version is not None
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.replace(url, b"%d" % i, version[1]), range(8)))
        created = list(pool.map(lambda i: storage.create(f"{url}2", b"%d" % i), range(8)))
    assert sum(won) == sum(created) == 1


def test_conditions_are_honoured(root: str) -> None:
    assert storage.honours_conditions(root)
    assert storage.ls(root) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    require(subprocess.run(mount, check=False, capture_output=True).returncode == 0, "the right to mount")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_and_read_only_disks_are_not_reported_as_bugs(tiny_disk: Path) -> None:
    storage.write(f"{tiny_disk}/x", b"before")
    with pytest.raises(UnreachableError, match="no space is left for "):
        storage.write(f"{tiny_disk}/x", bytes(100_000))
    assert storage.read(f"{tiny_disk}/x") == b"before"
    assert [path.name for path in tiny_disk.iterdir()] == ["x"]
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(CredentialsError, match=r"no access to .*Read-only file system"):
        storage.write(f"{tiny_disk}/x", b"1")


def test_detects_a_store_without_conditional_replacement() -> None:
    assert not storage.honours_conditions("memory://somewhere")


def test_a_store_whose_package_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"gs://bucket/x cannot be opened: .*gcsfs"):
        storage.read("gs://bucket/x")
    with pytest.raises(ConfigError, match="nosuch://x cannot be opened: Protocol not known"):
        storage.read("nosuch://x")


def test_options_that_only_s3fs_knows_are_used(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `FSSPEC_S3` options, which botocore would not get, ranges are read by s3fs."""
    storage.write(f"{bucket}/x", b"0123456789")
    with storage.open_read(f"{bucket}/x", 10, (2, 8)) as file:
        assert isinstance(file, RangeFile)
        file.seek(3)
        assert (file.read(2), file.read(100), file.read()) == (b"34", b"56789", b"")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"default_block_size": 1 << 20})
    with storage.open_read(f"{bucket}/x", 10, (2, 8)) as file:
        assert not isinstance(file, RangeFile) and file.read() == b"0123456789"


def test_a_range_of_an_object_that_does_not_exist_is_an_error_with_its_name(bucket: str) -> None:
    with storage.open_read(f"{bucket}/absent", 10) as file, pytest.raises(DataError, match=f"{bucket}/absent"):
        file.read(3)


class _NotFound(BaseHTTPRequestHandler):
    """Answers as a web server does that knows nothing of S3."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Prints nothing."""


def test_a_server_that_is_not_one_of_s3_is_no_empty_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    _use(monkeypatch, "key", "secret")
    try:
        for read in (storage.ls, storage.find, storage.remove):
            with pytest.raises(ConfigError, match="/folder cannot be opened") as caught:
                read("s3://bucket/folder")
            assert "AWS_ENDPOINT_URL_S3" in caught.value.remedy
    finally:
        server.shutdown()
        server.server_close()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
