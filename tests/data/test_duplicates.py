"""Which rows are near-duplicates: groups, placeholders and missing values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fusion.config import RunConfig
from fusion.data.duplicates import _text_labels, near_duplicate_groups, vector_labels
from tests.data.tables_of_noise import make, noise


def test_groups_connect_through_texts_vectors_and_columns() -> None:
    table = make(6, catalog_content=["a", "a", "c", "d", "e", "f"], brand=["", "", "", "x", "x", ""])
    image = noise(6)
    image[2] = image[1]
    groups = near_duplicate_groups(table, {"image": image}, RunConfig(group_column="brand"))
    assert groups.tolist() == [0, 0, 0, 1, 1, 2]
    assert near_duplicate_groups(table, {"image": image}, RunConfig()).tolist() == [0, 0, 0, 1, 2, 3]


def test_a_placeholder_is_no_duplicate(capsys: pytest.CaptureFixture[str]) -> None:
    image = noise()
    image[:51] = image[0]
    image[100:150] = image[100]
    groups = near_duplicate_groups(make(), {"image": image}, RunConfig())
    assert len(set(groups[:51])) == 51
    assert len(set(groups[100:150])) == 1
    assert "event=placeholder column=image rows=51" in capsys.readouterr().err


def test_a_group_column_has_no_placeholders() -> None:
    groups = near_duplicate_groups(make(brand=["x"] * 100 + [""] * 900), {}, RunConfig(group_column="brand"))
    assert len(set(groups[:100])) == 1


def test_missing_vectors_and_texts_are_no_duplicates() -> None:
    table = make(10, catalog_content=[""] * 10)
    assert len(set(near_duplicate_groups(table, {"image": np.zeros((10, 4), np.float32)}, RunConfig()))) == 10


def test_labels_of_vectors() -> None:
    rows = noise(200_000, seed=3).astype(np.float16).astype(np.float32)
    rows[150_000:] = rows[:50_000]
    rows[7] = 0
    labels = vector_labels(rows)
    shared = labels[:50_000]
    assert shared[7] == -1 and (labels[150_008:] == shared[8:]).all()
    assert (labels[50_000:150_000] == -1).all() and len(set(shared)) == 50_000


def test_labels_of_texts_are_those_of_equal_texts() -> None:
    generator = np.random.default_rng(0)
    letters = np.array(list("ab é漢"))
    texts = ["".join(generator.choice(letters, size)) for size in generator.integers(0, 24, 20_000)]
    texts += ["x" * 40_000, "x" * 39_999, "x" * 40_000, "a" * 8 + "b" * 8, "b" * 8 + "a" * 8, "a", "a\0"]
    found = _text_labels(pd.Series(texts, dtype="str"))
    trimmed = pd.Series([text.strip() for text in texts])
    expected = pd.factorize(trimmed)[0]
    is_shared = (trimmed != "") & trimmed.duplicated(keep=False)
    assert ((found >= 0) == is_shared).all() and 0.1 < is_shared.mean() < 0.9
    pairs = set(zip(found[is_shared], expected[is_shared], strict=True))
    assert len(pairs) == len(set(found[is_shared])) == len(set(expected[is_shared]))


def test_labels_of_missing_texts_and_of_a_part_of_a_column() -> None:
    column = pd.Series(["z", "a", None, " a ", "", "b", "c"], dtype="str")
    labels = _text_labels(column[1:6])
    assert labels[0] == labels[2] >= 0 and labels[[1, 3, 4]].tolist() == [-1, -1, -1]
