"""The seal of a page or model card: its last line is a comment with what it is about, and the sha256 of all above.

It detects accidents and mistakes, but not a change by somebody who computes the digest again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fusion import storage

REPORTS: Final = "reports"  # folder of an output with pages about several runs
_SEAL = re.compile(rb"<!-- fusion report of (\S+) sha256 ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class Sealed:
    """What the seal of a page says, and whether it is true.

    Attributes:
        about: id of the run, or name of the page.
    """

    about: str
    is_whole: bool


def sealed(page: str, about: str) -> bytes:
    """The page with its seal; `about` must not contain white space."""
    content = f"{page.rstrip()}\n".encode()
    return content + f"<!-- fusion report of {about} sha256 {storage.sha256(content)} -->\n".encode()


def seal_of(content: bytes) -> Sealed | None:
    """The seal of a page; None if it has none."""
    found = _SEAL.search(content)
    if found is None:
        return None
    return Sealed(found[1].decode(errors="replace"), storage.sha256(content[: found.start()]) == found[2].decode())
