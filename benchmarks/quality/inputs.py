"""Inputs of the peers for one fold; everything that is learned of the data is learned from its training rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import torch
from scipy.sparse import csr_array, hstack
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from benchmarks.quality.fold import Fold
from benchmarks.quality.kernel import Kernel, Part

CLAMP = 8.0  # standard deviations: beyond it are columns that are almost constant
COMPONENTS = 128  # of each source, for peers that do not take thousands of columns
TEXT_COMPONENTS = 256
LABEL = re.compile(r"^\s*([^:\n]{1,30}):\s*(\S.{0,60}?)\s*$", re.MULTILINE)  # "Brand: X", but no sentence
MIN_DF = 2  # a term of one row connects it with no other

V = TypeVar("V")

VARIANTS = ("prices", "embeddings", "embeddings + neighbours", "embeddings + text", "embeddings + text + neighbours")


@dataclass(frozen=True)
class Shared:
    """What all variants of a fold's inputs have in common, made once."""

    fold: Fold
    device: torch.device

    @cached_property
    def standardised(self) -> dict[str, np.ndarray]:
        """Role to [N, D]; missing rows are zeros, which is the mean."""
        return {role: standardise(values, self.fold.train) for role, values in self.fold.vectors.items()}

    @cached_property
    def components(self) -> dict[str, np.ndarray]:
        """Role to [N, at most 128] principal components, scaled together so that a source's mean variance is 1."""
        return {role: _principal(values, self.fold.train) for role, values in self.standardised.items()}

    @cached_property
    def terms(self) -> dict[str, csr_array]:
        """TF-IDF of words and pairs of words, of 3 to 5 characters, and of lines such as "Brand: X", of unit length."""
        vectorizers = {
            "words": TfidfVectorizer(ngram_range=(1, 2), min_df=MIN_DF, sublinear_tf=True),
            "characters": TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=MIN_DF, sublinear_tf=True),
            "labels": TfidfVectorizer(analyzer=labels, min_df=MIN_DF),
        }
        return {name: found for name, one in vectorizers.items() if (found := self._terms(one)) is not None}

    def _terms(self, vectorizer: TfidfVectorizer) -> csr_array | None:
        try:
            vectorizer.fit([self.fold.texts[row] for row in self.fold.train])
        except ValueError:  # no term occurs twice
            return None
        return csr_array(vectorizer.transform(self.fold.texts), dtype=np.float32)

    @cached_property
    def topics(self) -> np.ndarray:
        """[N, at most 256] of all terms, by a truncated SVD."""
        terms = csr_array(hstack(list(self.terms.values()), format="csr"))
        count = min(TEXT_COMPONENTS, terms.shape[1] - 1, len(self.fold.train) - 1)
        svd = TruncatedSVD(count, random_state=0).fit(terms[self.fold.train])
        found = svd.transform(terms).astype(np.float32)
        return np.asarray(found / found[self.fold.train].std())

    def kernel(self, with_text: bool) -> Kernel:
        parts: dict[str, Part] = {role: normalize(values) for role, values in self.standardised.items()}
        return Kernel(self.fold, parts | (dict(self.terms) if with_text else {}), self.device)

    def weights(self, with_text: bool) -> torch.Tensor:
        """[P] of the kernel, fitted once."""
        return self._once(("weights", with_text), lambda: self.kernel(with_text).fitted())

    def neighbours(self, with_text: bool) -> np.ndarray:
        """[N, 7] features of `Kernel.features`, made once."""
        weights = self.weights(with_text)
        return self._once(("neighbours", with_text), lambda: self.kernel(with_text).features(weights))

    def _once(self, key: tuple[str, bool], make: Callable[[], V]) -> V:
        if key not in self._made:
            self._made[key] = make()
        return cast(V, self._made[key])

    @cached_property
    def _made(self) -> dict[tuple[str, bool], object]:
        return {}


@dataclass(frozen=True)
class Inputs:
    """Inputs [N, F] of all rows of a fold, in the form that a kind of peer takes."""

    shared: Shared
    variant: str

    @property
    def fold(self) -> Fold:
        return self.shared.fold

    @property
    def with_text(self) -> bool:
        return "text" in self.variant

    @cached_property
    def raw(self) -> np.ndarray:
        """As they are, NaN where missing: for trees."""
        return np.hstack([*self.fold.vectors.values(), *self._further])

    @cached_property
    def wide(self) -> np.ndarray:
        """Standardised, every dimension: for linear models."""
        return np.hstack([*self.shared.standardised.values(), *self._further_standardised])

    @cached_property
    def reduced(self) -> np.ndarray:
        """Principal components of each source: for networks."""
        return np.hstack([*self.shared.components.values(), *self._further_standardised])

    @property
    def _further_standardised(self) -> list[np.ndarray]:
        return [standardise(values, self.fold.train) for values in self._further]

    @cached_property
    def _further(self) -> list[np.ndarray]:
        found = [self.shared.topics] if self.with_text else []
        if "neighbours" in self.variant:
            found.append(self.shared.neighbours(self.with_text))
        return found


def standardise(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[N, D] float32 with mean 0 and deviation 1 over these rows; constant columns and missing rows are zeros."""
    known = values[rows].astype(np.float64)
    known = known[~np.isnan(known).any(1)]
    mean, deviation = known.mean(0), known.std(0)
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    return np.nan_to_num(((values - mean) * scale).clip(-CLAMP, CLAMP)).astype(np.float32)


def labels(text: str) -> list[str]:
    """
    >>> labels("Item Name: Blue shirt\\nBrand: Acme \\nMade of cotton")
    ['item name=blue shirt', 'brand=acme']
    """
    return [f"{name.strip()}={value}".lower() for name, value in LABEL.findall(text)]


def _principal(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    count = min(COMPONENTS, values.shape[1], len(rows))
    pca = PCA(count, svd_solver="randomized", random_state=0).fit(values[rows])
    found = pca.transform(values).astype(np.float32)
    return np.asarray(found / found[rows].std())
