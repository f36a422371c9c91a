"""Texts of users, buckets and clusters, which are not trusted, on a terminal."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with control characters escaped, so that it cannot control the terminal.

    >>> print(visible("a\x1b[2J"))
    a\\x1b[2J
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
