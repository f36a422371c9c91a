"""Pointers: small documents in `pointers/` that name the newest or best run, or the current submission.

Apart from `lease.json`, they are the only documents in a bucket that change. They are written by compare-and-swap, so
that of two jobs that move a pointer at once neither overwrites the other's decision without having seen it.
"""

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
    """URL of a pointer: `url(output, "runs", "qwen_clip", "best")`."""
    return storage.join(output, "pointers", *parts) + ".json"


def read(kind: type[T], output: str, *parts: str) -> T | None:
    """What the pointer names; None if there is no such pointer, or, with a warning, if it is damaged."""
    return schemas.read_if_whole(kind, url(output, *parts), DAMAGED)


def move(
    output: str,
    *parts: str,
    target: T,
    unless: Callable[[T], bool] = lambda _: False,
    seen: tuple[bytes, str] | None = None,
) -> bool:
    """Makes the pointer name `target`, unless `unless` returns True for what it names now.

    Returns whether the pointer names `target` now. A damaged pointer is overwritten.

    Args:
        parts: path of the pointer below `pointers/`, without ".json".
        target: a `RunPointer` or `SubmissionPointer`.
        unless: receives what the pointer names now; True keeps it. It is asked again if another job moves the pointer.
        seen: the pointer as `storage.read_version` returned it a moment ago, which saves a request.
    """
    pointer_url = url(output, *parts)
    fields: dict[str, Any] = asdict(target)  # type: ignore[call-overload]
    for _ in turns(pointer_url):
        held = seen or storage.read_version(pointer_url)
        seen = None  # on the next turn the pointer has changed, and must be read
        current = None if held is None else schemas.parse_if_whole(type(target), held[0], pointer_url, DAMAGED)
        if current is not None and (current == target or unless(current)):
            return current == target
        data = schemas.seal({"pointer": "/".join(parts), **fields, "updated": schemas.now()})
        is_written = storage.create(pointer_url, data) if held is None else storage.replace(pointer_url, data, held[1])
        if is_written:
            return True
    raise AssertionError("turns() raises an error after its last turn")
