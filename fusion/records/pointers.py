"""Pointers, which name what is newest or best: the documents of a bucket that change, always by compare-and-swap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fusion import storage
from fusion.records import schemas
from fusion.records.contention import turns

T = TypeVar("T")

DAMAGED = "pointer_damaged"


def url(output: str, *parts: str) -> str:
    return storage.join(output, "pointers", *parts) + ".json"


def read(kind: type[T], output: str, *parts: str) -> T | None:
    """What is pointed to; None when nothing is, or the pointer is damaged."""
    return schemas.read_if_whole(kind, url(output, *parts), DAMAGED)


def move(
    output: str,
    *parts: str,
    target: T,
    unless: Callable[[T], bool] = lambda _: False,
    seen: tuple[bytes, str] | None = None,
) -> bool:
    """Points to `target`, a `RunPointer` or `SubmissionPointer`, unless what is pointed to now is to be kept.

    Returns whether it points to `target` now. A damaged pointer points to nothing.

    Args:
        seen: the pointer as `storage.read_version` gave it a moment ago, which saves asking again.
    """
    place = url(output, *parts)
    fields: dict[str, Any] = asdict(target)  # type: ignore[call-overload]
    for _ in turns(place):
        held, seen = seen or storage.read_version(place), None
        current = None if held is None else schemas.parse_if_whole(type(target), held[0], place, DAMAGED)
        if current is not None and (current == target or unless(current)):
            return current == target
        data = schemas.seal({"pointer": "/".join(parts), **fields, "updated": schemas.now()})
        if storage.create(place, data) if held is None else storage.replace(place, data, held[1]):
            return True
    raise AssertionError("the turns end with an error")
