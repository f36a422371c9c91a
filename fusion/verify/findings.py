"""What checks of a bucket come to, one line each, and the checks that several kinds of folder have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import ValidationError

from fusion import storage
from fusion.errors import DataError
from fusion.records.manifests import MANIFEST
from fusion.records.schemas import FileEntry, Manifest, Seal, reason, seal_of, validated

if TYPE_CHECKING:
    import pandas as pd

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
    """The findings so far.

    Args:
        say: called with each as it is made.
        place: what stands before each finding, such as "runs/r: ".
    """

    def __init__(self, say: Callable[[Finding], None] = lambda _: None, place: str = "") -> None:
        self.findings: list[Finding] = []
        self.say, self.place = say, place

    @contextmanager
    def within(self, place: str) -> Iterator[None]:
        """Names where what is found inside lies."""
        before, self.place = self.place, f"{place}: "
        yield
        self.place = before

    @property
    def n_wrong(self) -> int:
        return sum(finding.verdict == "BAD" for finding in self.findings)

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.say(finding)

    def ok(self, what: str) -> None:
        self.add(Finding("ok", f"{self.place}{what}"))

    def note(self, what: str) -> None:
        self.add(Finding("note", f"{self.place}{what}"))

    def bad(self, what: str, expected: object, found: object) -> None:
        self.add(Finding("BAD", f"{self.place}{what}: expected {expected}, found {found}"))

    def expect(self, what: str, expected: object, found: object) -> None:
        if found == expected:
            self.ok(f"{what}: {found}")
        else:
            self.bad(what, expected, found)


def check_files(
    report: Report, folder: str, kind: type[M], required: set[str], left_out: Container[str] = ()
) -> tuple[M | None, dict[str, bytes]]:
    """Checks a folder's files against its manifest and reports what is wrong.

    Returns the manifest (None if it is missing or invalid) and the bytes of each listed file that exists, damaged ones
    included.

    Args:
        left_out: names of files that a copy of the folder may lack.
    """
    name, contents = storage.base(folder), dict[str, bytes]()
    manifest = parsed(report, f"{name}/{MANIFEST}", read(storage.join(folder, MANIFEST)), kind)
    if manifest is None:
        return None, contents
    keys = {entry.key for entry in manifest.files}
    if required - keys:
        report.bad(f"{name}/{MANIFEST}", " and ".join(sorted(required)), " and ".join(sorted(keys)) or "no files")
    for entry in manifest.files:
        data = read(storage.join(folder, entry.key))
        if data is None and entry.key in left_out:
            report.note(f"{name}/{entry.key}: not pulled")
            continue
        check_content(report, f"{name}/{entry.key}", entry, data)
        contents |= {} if data is None else {entry.key: data}
    return manifest, contents


def check_content(report: Report, what: str, entry: FileEntry, data: bytes | None) -> None:
    """Whether these are the bytes that a manifest names."""
    found = "no such file" if data is None else _measure(len(data), storage.sha256(data))
    report.expect(what, _measure(entry.bytes, entry.sha256), found)


def check_beginning(report: Report, what: str, entry: FileEntry, data: bytes | None) -> None:
    """Whether the file begins with the bytes that a document names: it may have been appended to since."""
    check_content(report, what, entry, None if data is None else data[: entry.bytes])


def _measure(n_bytes: int, sha256: str) -> str:
    return f"{n_bytes} bytes, sha256 {sha256[:12]}…{sha256[-4:]}"


def check_once(report: Report, what: str, ids: Sequence[str]) -> None:
    """Whether each id occurs once, and none is empty: one finding."""
    twice = [sample_id for sample_id, count in Counter(ids).items() if count > 1 or not sample_id]
    if twice:
        report.bad(what, "each once, none empty", f"{len(twice)} others: {some(twice)}")
    else:
        report.ok(f"{what}: each once")


def check_comparables(report: Report, what: str, rows: pd.DataFrame) -> None:
    """Whether rows that name comparable products name some that can be."""
    from fusion.submissions.predictions import COMPARABLES, misnamed

    if not any(name in rows for name in COMPARABLES):
        return  # a model without neighbours
    try:
        n_wrong = misnamed(rows)
    except (KeyError, ValueError, TypeError) as error:
        report.bad(what, f"lists {', '.join(COMPARABLES)}", first_line(error))
        return
    if n_wrong:
        report.bad(what, "different comparable products, the weightiest first", f"{n_wrong} other rows")
    else:
        report.ok(f"{what}: comparable products")


def parsed(report: Report, what: str, data: bytes | None, kind: type[T], *, sealed: bool = True) -> T | None:
    """The JSON as `kind`, and that it is, as it was written: one finding."""
    if data is None:
        report.bad(what, "JSON", "no such file")
        return None
    try:
        value = validated(kind, data)
    except ValidationError as error:
        report.bad(what, *reason(error.errors()[0]))
        return None
    if sealed and seal_of(data) is Seal.BROKEN:
        report.bad(what, "what was written", "a document that does not fit its own sha256")
        return None
    if sealed and seal_of(data) is Seal.ABSENT:
        report.note(f"{what}: {Seal.ABSENT.value}")
    else:
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
