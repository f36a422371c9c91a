"""The findings of the checks, one line each, and the checks that several kinds of folders share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import ValidationError

from fusion import storage
from fusion.errors import DataError
from fusion.records.manifests import MANIFEST, Folder
from fusion.records.schemas import FileEntry, Manifest, Seal, reason, seal_of, validated

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True)
class Finding:
    """The result of one check; as text, its line of the report.

    >>> print(Finding("BAD", "rows: expected 3, found 2"))
    BAD  rows: expected 3, found 2
    """

    verdict: Literal["ok", "BAD", "note"]
    what: str

    def __str__(self) -> str:
        return f"{self.verdict:<5}{self.what}"


class Report:
    """Collects findings.

    Args:
        say: called with each finding as soon as it is made.
        prefix: text before each finding, such as "runs/r: ".
    """

    def __init__(self, say: Callable[[Finding], None] = lambda _: None, prefix: str = "") -> None:
        self.findings: list[Finding] = []
        self.say, self.prefix = say, prefix

    @contextmanager
    def within(self, folder: str) -> Iterator[None]:
        """Puts the name of the folder before the findings that are made inside of the `with` block."""
        before, self.prefix = self.prefix, f"{folder}: "
        yield
        self.prefix = before

    @property
    def n_wrong(self) -> int:
        return sum(finding.verdict == "BAD" for finding in self.findings)

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.say(finding)

    def ok(self, what: str) -> None:
        self.add(Finding("ok", f"{self.prefix}{what}"))

    def note(self, what: str) -> None:
        """Adds something that a reader should know, but that is not an error."""
        self.add(Finding("note", f"{self.prefix}{what}"))

    def bad(self, what: str, expected: object, found: object) -> None:
        self.add(Finding("BAD", f"{self.prefix}{what}: expected {expected}, found {found}"))

    def expect(self, what: str, expected: object, found: object) -> None:
        """Adds ok if both are equal, else BAD."""
        if found == expected:
            self.ok(f"{what}: {found}")
        else:
            self.bad(what, expected, found)


def check_files(
    report: Report, folder: Folder, kind: type[M], required: set[str], left_out: Container[str] = ()
) -> tuple[M | None, dict[str, bytes]]:
    """Checks the manifest of a folder and the sha256 of every file that it lists.

    Args:
        kind: type of the manifest.
        required: names of files that the manifest must list.
        left_out: names of files that a copy of the folder may lack.

    Returns:
        The manifest, or None if it is missing or damaged; and name to bytes of each listed file that exists, damaged
        or not.
    """
    name, contents = folder.name, dict[str, bytes]()
    manifest = parsed(report, f"{name}/{MANIFEST}", read(folder.manifest_url), kind)
    if manifest is None:
        return None, contents
    keys = {entry.key for entry in manifest.files}
    if required - keys:
        report.bad(f"{name}/{MANIFEST}", " and ".join(sorted(required)), " and ".join(sorted(keys)) or "no files")
    for entry in manifest.files:
        data = read(folder.at(entry.key))
        if data is None and entry.key in left_out:
            report.note(f"{name}/{entry.key}: not pulled")
            continue
        check_content(report, f"{name}/{entry.key}", entry, data)
        contents |= {} if data is None else {entry.key: data}
    return manifest, contents


def check_content(report: Report, what: str, entry: FileEntry, data: bytes | None) -> None:
    """Checks that these bytes have the size and sha256 that a manifest states; None if the file does not exist."""
    found = "no such file" if data is None else _measure(len(data), storage.sha256(data))
    report.expect(what, _measure(entry.bytes, entry.sha256), found)


def check_beginning(report: Report, what: str, entry: FileEntry, data: bytes | None) -> None:
    """As `check_content`, but the file may be longer, because it may have been appended to since."""
    check_content(report, what, entry, None if data is None else data[: entry.bytes])


def _measure(n_bytes: int, sha256: str) -> str:
    return f"{n_bytes} bytes, sha256 {sha256[:12]}…{sha256[-4:]}"


def check_once(report: Report, what: str, ids: Sequence[str]) -> None:
    """Checks that no id is repeated or empty: one finding."""
    wrong = [sample_id for sample_id, count in Counter(ids).items() if count > 1 or not sample_id]
    if wrong:
        report.bad(what, "each once and not empty", f"{len(wrong)} repeated or empty: {some(wrong)}")
    else:
        report.ok(f"{what}: each once")


def check_comparables(report: Report, what: str, rows: pd.DataFrame) -> None:
    """Checks the columns with comparable products, if there are any, see `predictions.misnamed`."""
    from fusion.submissions.predictions import COMPARABLES, misnamed

    if not any(name in rows for name in COMPARABLES):
        return  # a model without neighbours
    try:
        n_wrong = misnamed(rows)
    except (KeyError, ValueError, TypeError) as error:
        report.bad(what, f"lists {', '.join(COMPARABLES)}", first_line(error))
        return
    if n_wrong:
        report.bad(what, "distinct comparable products in order of their weight", f"{n_wrong} other rows")
    else:
        report.ok(f"{what}: comparable products")


def parsed(report: Report, what: str, data: bytes | None, kind: type[T], *, sealed: bool = True) -> T | None:
    """Checks a JSON document: one finding. Returns it as `kind`; None if it is missing or damaged.

    Args:
        what: name of the document, for the finding.
        data: its content; None if it does not exist.
        sealed: whether it must contain a digest of itself.
    """
    if data is None:
        report.bad(what, "JSON", "no such file")
        return None
    try:
        value = validated(kind, data)
    except ValidationError as error:
        report.bad(what, *reason(error.errors()[0]))
        return None
    if sealed and seal_of(data) is Seal.BROKEN:
        report.bad(what, "what was written", "a document that does not match its own sha256")
        return None
    if sealed and seal_of(data) is Seal.ABSENT:
        report.note(f"{what}: {Seal.ABSENT.value}")
    else:
        report.ok(what)
    return value


def read(url: str) -> bytes | None:
    """Content of a file; None if it does not exist."""
    try:
        return storage.read(url)
    except DataError:
        return None


def read_as(kind: type[T], url: str) -> T | None:
    """A JSON document; None if it does not exist or is damaged, which the check of its folder reports."""
    content = read(url)
    try:
        return None if content is None else validated(kind, content)
    except ValidationError:
        return None


def some(values: Sequence[str]) -> str:
    """The first three values in alphabetical order, for a message; "none" if there are none."""
    return ", ".join(sorted(values)[:3]) or "none"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if the text is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)
