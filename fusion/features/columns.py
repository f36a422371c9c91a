"""Turns columns of the tables into vectors. Each column is fitted on the training rows.

If a column has values of another type than in training, it is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter

from fusion.errors import DataError

MISSING = pa.array(["", "nan", "na", "n/a", "null", "none", "<na>", "nat", "-"], pa.large_string())  # lower case
MOST_CATEGORIES = 64  # the most frequent categories have a dimension each; all others share one
WIDE = 100.0  # if the largest absolute value is more than this times the median one, logarithms are used
LARGEST = 8.0  # standard deviations at which scaled numbers are clamped; only outliers reach it
# A column whose rank correlation with the price is higher than this (in absolute value) is taken for a copy of the
# price in another unit. A real property of products is never that exact. Columns with fewer than FEWEST different
# values are not checked, because few values can order rows like their prices by chance.
SUSPICIOUS, FEWEST = 0.995, 20


@dataclass(frozen=True)
class Column:
    """A fitted column.

    Attributes:
        is_log: whether a number x is replaced by sign(x) * log1p(|x|).
        centre, scale: mean and standard deviation of the numbers, after this.
        categories: the most frequent texts, in descending order of frequency.
    """

    name: str
    kind: Literal["number", "category"]
    is_log: bool = False
    centre: float = 0.0
    scale: float = 1.0
    categories: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """Number of dimensions. Numbers: value and "is missing". Categories: one each, "any other" and "is missing"."""
        return 2 if self.kind == "number" else len(self.categories) + 2

    def vectors(self, texts: pa.Array, where: str) -> np.ndarray:
        """[n, D] float32 vectors of the column's values.

        Args:
            where: name of the file, for messages.

        Raises:
            DataError: the values have another type than in training.
        """
        return self._numbers(texts, where) if self.kind == "number" else self._one_hot(texts, where)

    def _numbers(self, texts: pa.Array, where: str) -> np.ndarray:
        values, is_missing = numbers(texts), missing(texts)
        wrong = np.flatnonzero(np.isnan(values) & ~is_missing)
        if len(wrong):
            raise DataError(
                f"column {self.name!r} of {where} has {texts[int(wrong[0])].as_py()!r}, but all its values were "
                "numbers in training",
                "write it as it was in training, or train again",
            )
        scaled = (_logs(values) if self.is_log else values) - self.centre
        scaled = np.where(is_missing, 0.0, scaled / self.scale).clip(-LARGEST, LARGEST)
        return np.stack([scaled, is_missing], axis=1).astype(np.float32)

    def _one_hot(self, texts: pa.Array, where: str) -> np.ndarray:
        is_missing = missing(texts)
        index = pc.index_in(_trimmed(texts), value_set=pa.array(self.categories, pa.large_string()))
        index = index.fill_null(len(self.categories)).to_numpy(zero_copy_only=False)
        index = np.where(is_missing, len(self.categories) + 1, index)
        is_other = index == len(self.categories)
        if is_other.any() and is_other[~is_missing].all() and not np.isnan(numbers(texts)[is_other]).any():
            raise DataError(
                f"column {self.name!r} of {where} has only numbers, but its values were texts such as "
                f"{self.categories[0]!r} in training",
                "write it as it was in training, or train again",
            )
        found: np.ndarray = (index[:, None] == np.arange(self.dim)).astype(np.float32)
        return found


COLUMNS = TypeAdapter(tuple[Column, ...])


def fit(name: str, texts: pa.Array, prices: np.ndarray) -> Column:
    """Fits a column on the training rows.

    Args:
        prices: [n]; only used to find out whether the column is a copy of them.

    Raises:
        DataError: the column has no values, or is a copy of the prices.
    """
    values, is_missing = numbers(texts), missing(texts)
    if is_missing.all():
        raise DataError(f"column {name!r} is empty in all {len(texts)} training rows", "leave it out of --columns")
    if np.isnan(values[~is_missing]).any():
        return _category(name, texts.filter(pa.array(~is_missing)))
    _refuse_prices(name, values[~is_missing], prices[~is_missing])
    return _number(name, values[~is_missing])


def missing(texts: pa.Array) -> np.ndarray:
    """[n] bool: whether the value is missing."""
    found = pc.is_in(pc.utf8_lower(_trimmed(texts)), value_set=MISSING)
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def numbers(texts: pa.Array) -> np.ndarray:
    """[n] float64; NaN for values that are not finite numbers."""
    found: pd.Series = pd.to_numeric(_trimmed(texts).to_pandas(), errors="coerce")
    values = np.asarray(found, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _trimmed(texts: pa.Array) -> pa.Array:
    return pc.utf8_trim_whitespace(texts.fill_null(""))


def _number(name: str, values: np.ndarray) -> Column:
    sizes = np.abs(values)
    # 1e-9: if most numbers are 0, so is their median, and any other number counts as wide.
    is_log = bool(sizes.max() > WIDE * max(float(np.median(sizes)), 1e-9))
    values = _logs(values) if is_log else values
    return Column(name, "number", is_log, float(values.mean()), float(values.std()) or 1.0)


def _logs(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))


def _category(name: str, texts: pa.Array) -> Column:
    counts = _trimmed(texts).to_pandas().value_counts()
    ordered = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    return Column(name, "category", categories=tuple(str(text) for text, _ in ordered[:MOST_CATEGORIES]))


def _refuse_prices(name: str, values: np.ndarray, prices: np.ndarray) -> None:
    if len(np.unique(values)) < FEWEST:
        return
    ranks = pd.DataFrame({"value": values, "price": prices}).rank()
    correlation = float(ranks["value"].corr(ranks["price"]))
    if abs(correlation) > SUSPICIOUS:
        raise DataError(
            f"column {name!r} orders the rows as their prices do (rank correlation {correlation:.4f}): it seems to be "
            "a copy of the price, which would make scores meaningless",
            "leave it out of --columns",
        )
