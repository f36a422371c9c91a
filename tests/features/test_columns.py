"""Columns of the tables as numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.errors import DataError
from fusion.features import columns as features_columns
from tests.features.texts import texts


def test_numbers_are_scaled_and_wide_ones_by_their_logarithm() -> None:
    narrow = features_columns.fit("n", texts(["1", " 2 ", "3.0", "N/A"]), np.ones(4))
    assert (narrow.kind, narrow.is_log, narrow.centre) == ("number", False, 2.0)
    np.testing.assert_allclose(narrow.vectors(texts(["2", "", "1e300"]), "x"), [[0, 0], [0, 1], [8, 0]])
    wide = features_columns.fit("n", texts(["1", "10", "-100000"]), np.ones(3))
    assert wide.is_log and np.isfinite(wide.vectors(texts(["1e308", "-1e308"]), "x")).all()


def test_frequent_categories_have_a_dimension_each_and_others_share_one() -> None:
    many = [f"c{number}" for number in range(100) for _ in range(100 - number)]
    column = features_columns.fit("c", texts([*many, ""]), np.ones(len(many) + 1))
    assert column.categories[:2] == ("c0", "c1") and len(column.categories) == features_columns.MOST_CATEGORIES
    found = column.vectors(texts(["c1", "c99", "new", "", " c0 "]), "x")
    assert found.argmax(1).tolist() == [1, 64, 64, 65, 0] and (found.sum(1) == 1).all()


@pytest.mark.parametrize(
    ("training", "later", "said"),
    [
        (["1", "2"], ["3", "four"], "has 'four', but all its values were numbers in training"),
        (["a", "b"], ["1", "2"], "has only numbers, but its values were texts such as 'a' in training"),
    ],
)
def test_a_column_of_another_type_is_refused(training: list[str], later: list[str], said: str) -> None:
    column = features_columns.fit("c", texts(training), np.ones(2))
    with pytest.raises(DataError, match=rf"column 'c' of test\.csv {said}"):
        column.vectors(texts(later), "test.csv")


def test_rejects_a_copy_of_the_price() -> None:
    prices = np.random.default_rng(0).uniform(1, 100, 50)
    with pytest.raises(DataError, match=r"orders the rows as their prices do \(rank correlation -1\.0000\)") as caught:
        features_columns.fit("discount", texts([str(-price) for price in prices]), prices)
    assert caught.value.remedy == "leave it out of --columns"
    with pytest.raises(DataError, match="'empty' is empty in all 2 training rows"):
        features_columns.fit("empty", texts(["", "nan"]), np.ones(2))
