"""Texts are ordered as pyarrow orders them, whatever prefix they share and wherever they end."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from fusion.data.text_order import text_order

SEVERAL = {
    "numbers": [str(number) for number in range(3000)],
    "padded numbers": [f"product-{number:012d}" for number in range(3000)],
    "long prefixes": [f"{number % 7}-of-many-things-{number}" for number in range(3000)],
    "beyond ASCII": [f"é{chr(0x4E00 + number)}-{number}" for number in range(3000)],
    "prefixes of each other": ["", "a", "a\0", "a\0\0", "ab", "abcdefgh", "abcdefghi", "abcdefg", "b", "\0"],
    "one": ["x"],
    "none": [],
    "an empty text": [""],
}


@pytest.mark.parametrize("texts", SEVERAL.values(), ids=SEVERAL)
def test_orders_texts_by_their_bytes(texts: list[str]) -> None:
    shuffled = pa.array(np.random.default_rng(0).permutation(np.array(texts, object)), pa.large_string())
    assert shuffled.take(pa.array(text_order(shuffled))).to_pylist() == sorted(texts, key=str.encode)
    assert sorted(text_order(shuffled)) == list(range(len(texts)))


def test_a_slice_is_ordered_by_itself() -> None:
    texts = pa.array(["z", "c", "a", "b", "y"], pa.large_string()).slice(1, 3)
    assert text_order(texts).tolist() == pc.sort_indices(texts).to_pylist() == [1, 2, 0]
