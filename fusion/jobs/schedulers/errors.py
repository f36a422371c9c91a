"""Finds the error that a job ended with in its log."""

from __future__ import annotations

import re

from fusion.terminal.escapes import visible

# `to do:` is how earlier versions began a hint; logs of their jobs may still be in use.
ERROR = re.compile(r"^error: .*(?:\n(?:hint|to do): .*)?", re.MULTILINE)


def last_error(log: str) -> str:
    """The last error in a log with its hint, safe to print on a terminal; empty when there is none.

    >>> print(last_error("error: a\\x1b\\nhint: b\\nsrun: error: c\\n"))
    error: a\\x1b
    hint: b
    """
    found: list[str] = ERROR.findall(log)
    return "\n".join(map(visible, found[-1].splitlines())) if found else ""
