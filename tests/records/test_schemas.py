"""Documents contain a digest of themselves; those of earlier versions, which do not, are still read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion import storage
from fusion.errors import DataError
from fusion.records import schemas
from fusion.records.schemas import LeaseRecord, Seal, seal, seal_of

LEASE = {"attempt": 1, "token": "x", "started": "2026-01-02T03:04:05Z"}


def test_the_seal_does_not_depend_on_the_layout_of_the_json() -> None:
    assert seal_of(seal(LEASE)) is Seal.WHOLE
    assert seal_of(json.dumps(json.loads(seal(LEASE)), sort_keys=True).encode()) is Seal.WHOLE
    assert seal(json.loads(seal(LEASE))) == seal(LEASE)


@pytest.mark.parametrize("content", [LEASE, LEASE | {"schema": 1}])
def test_documents_of_schema_1_have_no_seal(content: dict[str, object]) -> None:
    assert seal_of(storage.as_json(content)) is Seal.ABSENT


@pytest.mark.parametrize("key", json.loads(seal(LEASE)))
def test_removing_or_changing_a_key_breaks_the_seal(key: str) -> None:
    document = json.loads(seal(LEASE))
    without = {name: value for name, value in document.items() if name != key}
    for changed in (without, document | {key: f"{document[key]}0"}, document | {"another": None}):
        assert seal_of(storage.as_json(changed)) is Seal.BROKEN


@pytest.mark.parametrize("content", [b"", b"[]", b'{"sha256": 1', b"\xff"])
def test_other_content_has_a_broken_seal(content: bytes) -> None:
    assert seal_of(content) is Seal.BROKEN


def test_reading_a_document_with_a_broken_seal_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_bytes(seal(LEASE))
    assert schemas.read(LeaseRecord, str(path)) == LeaseRecord(1, "x", "2026-01-02T03:04:05Z")
    path.write_bytes(seal(LEASE).replace(b'"attempt": 1', b'"attempt": 2'))
    with pytest.raises(DataError, match=r"lease.json is damaged: it has changed since it was written"):
        schemas.read(LeaseRecord, str(path))
    path.write_bytes(storage.as_json(LEASE))
    assert schemas.read(LeaseRecord, str(path)) is not None
