"""Finds in the log of a job what it said about its end."""

from __future__ import annotations

import re

ERROR = re.compile(r"^error: .*(?:\n(?:hint|to do): .*)?", re.MULTILINE)


def last_error(log: str) -> str:
    """The last error in a log, with what to do about it; empty when there is none.

    >>> last_error("error: a\\nhint: b\\nsrun: error: c\\n")
    'error: a\\nhint: b'
    """
    found: list[str] = ERROR.findall(log)
    return found[-1] if found else ""
