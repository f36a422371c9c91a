"""Columns of texts, and the terms in them, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from fusion.features.terms import Terms


def texts(values: list[str]) -> pa.Array:
    return pa.array(values, pa.large_string())


def found(kind: Callable[[pa.Array], Terms], text: str) -> set[int]:
    return set(kind(texts([text])).hashes.tolist())
