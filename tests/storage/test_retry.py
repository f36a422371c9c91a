"""Retries of requests to a store that does not answer, and the warnings meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator

import fsspec
import pytest

from fusion import storage
from fusion.errors import FusionError, UnreachableError
from fusion.storage import retry
from tests.plain_s3 import BUCKET, PlainS3

URL = f"s3://{BUCKET}/x"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def first_request(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of a process that has spoken to no store yet; nothing listens at the store's address."""
    monkeypatch.setattr(retry, "_known", set())
    monkeypatch.setattr(retry, "_last_said", float("-inf"))
    monkeypatch.setattr(retry, "FIRST_PATIENCE", 0.5)
    monkeypatch.setattr(retry, "QUIET", 0.0)
    use(monkeypatch, AWS_ENDPOINT_URL_S3=NOWHERE, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret")
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def use(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def failure() -> tuple[FusionError, float]:
    """How a read fails, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        storage.read(URL)
    return caught.value, time.monotonic() - began


@pytest.mark.parametrize("address", [NOWHERE, "http://no-such-host.invalid:9000"])
def test_retries_are_short_for_an_address_that_never_answered(
    address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, AWS_ENDPOINT_URL_S3=address)
    error, lasted = failure()
    assert address in error.message and "does not answer" in error.message
    assert lasted < 10  # not the 60 s of --store-timeout; half a second plus the last try and the name lookup
    assert capfd.readouterr().err.count("event=waiting") == 1


def test_a_store_that_has_answered_is_retried_for_the_whole_timeout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = PlainS3()
    use(monkeypatch, AWS_ENDPOINT_URL_S3=server.endpoint)
    assert not storage.exists(URL)  # that the object is missing is an answer, too
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # with the connections that are still open
    monkeypatch.setattr(storage, "_patience", 2.0)
    _, lasted = failure()
    assert lasted >= 2.0
    (said,) = capfd.readouterr().err.splitlines()
    assert f"event=waiting store={URL}" in said and "connection refused" in said and 'trying_for="2 s"' in said


def test_a_short_interruption_is_not_logged(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(retry, "QUIET", 60.0)
    failure()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_a_proxy_that_is_down_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    use(monkeypatch, AWS_ENDPOINT_URL_S3="http://storage.example.com", **{variable: NOWHERE})
    error, _ = failure()
    assert "HTTP_PROXY" in error.remedy and "NO_PROXY" in error.remedy
