"""Columns of the tables as numbers: each is fitted on the training rows, and says later when it is another column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter

from fusion.errors import DataError

MISSING = pa.array(["", "nan", "na", "n/a", "null", "none", "<na>", "nat", "-"], pa.large_string())
MOST_CATEGORIES = 64  # that get a place of their own; the others share one
WIDE = 100.0  # times the median, in size: such columns count by their logarithm
LARGEST = 8.0  # deviations
# Rank correlation with the price from which a column is taken for the price under another name.
SUSPICIOUS, FEWEST = 0.995, 20


@dataclass(frozen=True)
class Column:
    """What is known of a column.

    Attributes:
        is_log: numbers count by sign and log1p of their size.
        centre, scale: of the numbers, or of their logarithms.
        categories: the most frequent texts, by frequency.
    """

    name: str
    kind: Literal["number", "category"]
    is_log: bool = False
    centre: float = 0.0
    scale: float = 1.0
    categories: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """Numbers: value, is missing. Categories: one each, any other, is missing."""
        return 2 if self.kind == "number" else len(self.categories) + 2

    def vectors(self, texts: pa.Array, where: str) -> np.ndarray:
        """[n, D] float32.

        Args:
            where: what the file is called in messages.

        Raises:
            DataError: the column is of another type than in training.
        """
        return self._numbers(texts, where) if self.kind == "number" else self._one_hot(texts, where)

    def _numbers(self, texts: pa.Array, where: str) -> np.ndarray:
        values, is_missing = numbers(texts), missing(texts)
        wrong = np.flatnonzero(np.isnan(values) & ~is_missing)
        if len(wrong):
            raise DataError(
                f"column {self.name!r} of {where} has {texts[int(wrong[0])].as_py()!r}, and all its values were "
                "numbers in training",
                "write it as it was in training, or train again",
            )
        scaled = (_logs(values) if self.is_log else values) - self.centre
        scaled = np.where(is_missing, 0.0, scaled / self.scale).clip(-LARGEST, LARGEST)
        return np.stack([scaled, is_missing], axis=1).astype(np.float32)

    def _one_hot(self, texts: pa.Array, where: str) -> np.ndarray:
        is_missing = missing(texts)
        place = pc.index_in(_trimmed(texts), value_set=pa.array(self.categories, pa.large_string()))
        place = place.fill_null(len(self.categories)).to_numpy(zero_copy_only=False)
        place = np.where(is_missing, len(self.categories) + 1, place)
        is_other = place == len(self.categories)
        if is_other.any() and is_other[~is_missing].all() and not np.isnan(numbers(texts)[is_other]).any():
            raise DataError(
                f"column {self.name!r} of {where} has numbers only, and its values were texts such as "
                f"{self.categories[0]!r} in training",
                "write it as it was in training, or train again",
            )
        found: np.ndarray = (place[:, None] == np.arange(self.dim)).astype(np.float32)
        return found


COLUMNS = TypeAdapter(tuple[Column, ...])


def fit(name: str, texts: pa.Array, prices: np.ndarray) -> Column:
    """What the training rows say of a column; the prices [n] only serve to find out whether they are its values.

    Raises:
        DataError: it has no values, or they are the prices.
    """
    values, is_missing = numbers(texts), missing(texts)
    if is_missing.all():
        raise DataError(f"column {name!r} is empty in all {len(texts)} training rows", "leave it out of --columns")
    if np.isnan(values[~is_missing]).any():
        return _category(name, texts.filter(pa.array(~is_missing)))
    _refuse_prices(name, values[~is_missing], prices[~is_missing])
    return _number(name, values[~is_missing])


def missing(texts: pa.Array) -> np.ndarray:
    """[n] bool: there is no value."""
    found = pc.is_in(pc.utf8_lower(_trimmed(texts)), value_set=MISSING)
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def numbers(texts: pa.Array) -> np.ndarray:
    """[n] float64; NaN for what is no finite number."""
    found: pd.Series = pd.to_numeric(_trimmed(texts).to_pandas(), errors="coerce")
    values = np.asarray(found, np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _trimmed(texts: pa.Array) -> pa.Array:
    return pc.utf8_trim_whitespace(texts.fill_null(""))


def _number(name: str, values: np.ndarray) -> Column:
    sizes = np.abs(values)
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
            f"column {name!r} orders the rows as their prices do (rank correlation {correlation:.4f}): it is the price "
            "under another name, and a score with it would say nothing",
            "leave it out of --columns",
        )
