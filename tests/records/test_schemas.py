"""A document that has changed since it was written is damaged; one of an earlier version, without a seal, is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion import storage
from fusion.errors import DataError
from fusion.records import schemas
from fusion.records.schemas import LeaseRecord, Seal, seal, seal_of

LEASE = {"attempt": 1, "token": "x", "started": "2026-01-02T03:04:05Z"}


def test_a_sealed_document_is_whole_whatever_its_layout() -> None:
    assert seal_of(seal(LEASE)) is Seal.WHOLE
    assert seal_of(json.dumps(json.loads(seal(LEASE)), sort_keys=True).encode()) is Seal.WHOLE
    assert seal(json.loads(seal(LEASE))) == seal(LEASE)


@pytest.mark.parametrize("content", [LEASE, LEASE | {"schema": 1}])
def test_an_earlier_version_wrote_no_seal(content: dict[str, object]) -> None:
    assert seal_of(storage.as_json(content)) is Seal.ABSENT


@pytest.mark.parametrize("key", json.loads(seal(LEASE)))
def test_a_key_that_is_gone_or_changed_breaks_the_seal(key: str) -> None:
    document = json.loads(seal(LEASE))
    without = {name: value for name, value in document.items() if name != key}
    for changed in (without, document | {key: f"{document[key]}0"}, document | {"another": None}):
        assert seal_of(storage.as_json(changed)) is Seal.BROKEN


@pytest.mark.parametrize("content", [b"", b"[]", b'{"sha256": 1', b"\xff"])
def test_what_is_no_document_has_no_seal_that_fits(content: bytes) -> None:
    assert seal_of(content) is Seal.BROKEN


def test_readers_take_a_broken_seal_for_damage(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_bytes(seal(LEASE))
    assert schemas.read(LeaseRecord, str(path)) == LeaseRecord(1, "x", "2026-01-02T03:04:05Z")
    path.write_bytes(seal(LEASE).replace(b'"attempt": 1', b'"attempt": 2'))
    with pytest.raises(DataError, match=r"lease.json is damaged: it has changed since it was written"):
        schemas.read(LeaseRecord, str(path))
    path.write_bytes(storage.as_json(LEASE))
    assert schemas.read(LeaseRecord, str(path)) is not None
