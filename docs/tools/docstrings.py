"""An extension of griffe: examples in docstrings, which begin with `>>>`, become blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Lines from one that begins with >>> to the next empty one.
EXAMPLE = re.compile(r"^>>> .*?(?=\n[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r" *# doctest: .*$", re.MULTILINE)  # which only the tests need


def with_blocks(docstring: str) -> str:
    """The docstring, with its examples fenced."""
    return EXAMPLE.sub(lambda found: f"```pycon\n{DIRECTIVE.sub('', found[0])}\n```", docstring)


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_blocks(obj.docstring.value)
