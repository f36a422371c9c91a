"""Inputs of the peers for one fold. All transformations are fitted on the fold's training rows."""

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

CLAMP = 8.0  # standard deviations; only values of almost constant columns are larger
COMPONENTS = 128  # principal components per source, for peers that cannot use thousands of columns
TEXT_COMPONENTS = 256
LABEL = re.compile(r"^\s*([^:\n]{1,30}):\s*(\S.{0,60}?)\s*$", re.MULTILINE)  # "Brand: X", but not whole sentences
MIN_DF = 2  # a term that occurs in a single row relates it to no other row

V = TypeVar("V")

VARIANTS = ("prices", "embeddings", "embeddings + neighbours", "embeddings + text", "embeddings + text + neighbours")


@dataclass(frozen=True)
class Shared:
    """The parts that several variants of a fold's inputs share, computed once."""

    fold: Fold
    device: torch.device

    @cached_property
    def standardised(self) -> dict[str, np.ndarray]:
        """Role to [N, D] standardised vectors. Missing vectors are zeros, which is the mean."""
        return {role: standardise(values, self.fold.train) for role, values in self.fold.vectors.items()}

    @cached_property
    def components(self) -> dict[str, np.ndarray]:
        """Role to [N, at most 128] principal components, with one scale per source, so that the mean variance is 1."""
        return {role: _principal(values, self.fold.train) for role, values in self.standardised.items()}

    @cached_property
    def terms(self) -> dict[str, csr_array]:
        """TF-IDF of words and pairs of words, of character 3- to 5-grams, and of lines such as "Brand: X"."""
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
        """[N, at most 256] truncated SVD of all terms."""
        terms = csr_array(hstack(list(self.terms.values()), format="csr"))
        count = min(TEXT_COMPONENTS, terms.shape[1] - 1, len(self.fold.train) - 1)
        svd = TruncatedSVD(count, random_state=0).fit(terms[self.fold.train])
        found = svd.transform(terms).astype(np.float32)
        return np.asarray(found / found[self.fold.train].std())

    def kernel(self, with_text: bool) -> Kernel:
        parts: dict[str, Part] = {role: normalize(values) for role, values in self.standardised.items()}
        return Kernel(self.fold, parts | (dict(self.terms) if with_text else {}), self.device)

    def weights(self, with_text: bool) -> torch.Tensor:
        """[P] weights of the kernel, fitted once."""
        return self._once(("weights", with_text), lambda: self.kernel(with_text).fitted())

    def neighbours(self, with_text: bool) -> np.ndarray:
        """[N, 7] features of neighbours, see `Kernel.features`; computed once."""
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
    """Inputs [N, F] of all rows of a fold, in several forms for different kinds of peers."""

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
        """The original vectors, NaN where missing; for trees."""
        return np.hstack([*self.fold.vectors.values(), *self._further])

    @cached_property
    def wide(self) -> np.ndarray:
        """All dimensions, standardised; for linear models."""
        return np.hstack([*self.shared.standardised.values(), *self._further_standardised])

    @cached_property
    def reduced(self) -> np.ndarray:
        """Principal components of each source; for networks."""
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
    """The terms of lines "Label: value" in a text.

    >>> labels("Item Name: Blue shirt\\nBrand: Acme \\nMade of cotton")
    ['item name=blue shirt', 'brand=acme']
    """
    return [f"{name.strip()}={value}".lower() for name, value in LABEL.findall(text)]


def _principal(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    count = min(COMPONENTS, values.shape[1], len(rows))
    pca = PCA(count, svd_solver="randomized", random_state=0).fit(values[rows])
    found = pca.transform(values).astype(np.float32)
    return np.asarray(found / found[rows].std())
