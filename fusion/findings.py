"""What checks of a bucket come to, one line each, and the checks that several kinds of folder have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import ValidationError

from fusion import storage
from fusion.errors import DataError
from fusion.manifests import MANIFEST
from fusion.records import Manifest, reason, validated

T = TypeVar("T")
M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class Finding:
    """What one check came to; as text, its line of the report.

    >>> print(Finding("BAD", "rows: expected 3, found 2"))
    BAD  rows: expected 3, found 2
    """

    verdict: Literal["ok", "BAD", "note"]
    what: str

    def __str__(self) -> str:
        return f"{self.verdict:<5}{self.what}"


class Report:
    """The findings so far; `say` is told each as it is made."""

    def __init__(self, say: Callable[[Finding], None]) -> None:
        self.findings: list[Finding] = []
        self.say = say

    @property
    def n_wrong(self) -> int:
        return sum(finding.verdict == "BAD" for finding in self.findings)

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.say(finding)

    def ok(self, what: str) -> None:
        self.add(Finding("ok", what))

    def note(self, what: str) -> None:
        self.add(Finding("note", what))

    def bad(self, what: str, expected: object, found: object) -> None:
        self.add(Finding("BAD", f"{what}: expected {expected}, found {found}"))

    def expect(self, what: str, expected: object, found: object) -> None:
        if found == expected:
            self.ok(f"{what}: {found}")
        else:
            self.bad(what, expected, found)


def check_files(report: Report, folder: str, kind: type[M], required: set[str]) -> tuple[M | None, dict[str, bytes]]:
    """The manifest, if it is one, and the bytes of every file in it that is there, whole or not."""
    name, contents = storage.base(folder), dict[str, bytes]()
    manifest = parsed(report, f"{name}/{MANIFEST}", read(storage.join(folder, MANIFEST)), kind)
    if manifest is None:
        return None, contents
    keys = {entry.key for entry in manifest.files}
    if required - keys:
        report.bad(f"{name}/{MANIFEST}", " and ".join(sorted(required)), " and ".join(sorted(keys)) or "no files")
    for entry in manifest.files:
        data = read(storage.join(folder, entry.key))
        found = "no such file" if data is None else _measure(len(data), storage.sha256(data))
        report.expect(f"{name}/{entry.key}", _measure(entry.bytes, entry.sha256), found)
        contents |= {} if data is None else {entry.key: data}
    return manifest, contents


def _measure(n_bytes: int, sha256: str) -> str:
    return f"{n_bytes} bytes, sha256 {sha256[:12]}…{sha256[-4:]}"


def check_once(report: Report, what: str, ids: Sequence[str]) -> None:
    """Whether each id occurs once, and none is empty: one finding."""
    twice = [sample_id for sample_id, count in Counter(ids).items() if count > 1 or not sample_id]
    if twice:
        report.bad(what, "each once, none empty", f"{len(twice)} others: {some(twice)}")
    else:
        report.ok(f"{what}: each once")


def parsed(report: Report, what: str, data: bytes | None, kind: type[T]) -> T | None:
    """The JSON as `kind`, and that it is: one finding."""
    if data is None:
        report.bad(what, "JSON", "no such file")
        return None
    try:
        value = validated(kind, data)
    except ValidationError as error:
        report.bad(what, *reason(error.errors()[0]))
        return None
    report.ok(what)
    return value


def read(url: str) -> bytes | None:
    """The object's bytes; None when it does not exist."""
    try:
        return storage.read(url)
    except DataError:
        return None


def some(values: Sequence[str]) -> str:
    """The first three, for a message."""
    return ", ".join(sorted(values)[:3]) or "none"


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
