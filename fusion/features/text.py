"""Texts as dense vectors: TF-IDF of one kind of terms, projected on a few random directions.

Of two texts it matters how many rare terms they share. A random projection keeps the cosine of any two vectors (Johnson
and Lindenstrauss, 1984; with signs: Achlioptas, 2003) up to 1/sqrt(D), 0.04 here, while a truncated SVD keeps the
frequent terms and drops the rare ones. It needs no fit, and no place in a run's folder.

A `Space` is fitted on texts alone and never sees a price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from fusion.features.terms import KINDS, Terms

CHUNK_ROWS = 1024  # texts cut up at a time: 150 MB if each has 1,000 letters
MAX_LETTERS = 4096  # of a text that count: the longest descriptions repeat themselves, and memory stays bounded
FIT_ROWS = 1 << 16  # texts that the vocabulary is made from, drawn at random where there are more
MIN_ROWS = 2  # a term of one text says nothing of another
VOCABULARY = 1 << 15  # terms that are kept of a kind, the most frequent
DIM = 512


@dataclass(frozen=True)
class Space:
    """One kind of terms, and what each weighs.

    Attributes:
        kind: a key of `KINDS`.
        terms: [V] uint64 hashes, ascending.
        idf: [V] float32 weight of each term.
    """

    kind: str
    terms: np.ndarray
    idf: np.ndarray

    @cached_property
    def directions(self) -> np.ndarray:
        """[V, D] float32 signs, the same for all time: NumPy never changes what this generator gives (NEP 19)."""
        seed = list(KINDS).index(self.kind)
        signs = np.random.RandomState(seed).randint(0, 2, (len(self.terms), DIM), np.int8)
        return (2 * signs - 1).astype(np.float32) / np.float32(DIM**0.5)

    def vectors(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """[n, DIM] float32, and whether each text [n] has a term that is known; each row by itself."""
        weights = tfidf(KINDS[self.kind](texts), self.terms, self.idf)
        return np.asarray(weights @ self.directions), np.diff(weights.indptr) > 0


def shortened(texts: pa.Array) -> pa.Array:
    """The letters that count of each text; nothing where there is none."""
    return pc.utf8_slice_codeunits(texts.fill_null(""), 0, MAX_LETTERS)


def fit(kind: str, texts: pa.Array, beat: Callable[[], None] = lambda: None) -> Space | None:
    """The space of some texts; None if no two of them share a term.

    Args:
        texts: large_string, without nulls.
        beat: called now and then; it may raise.
    """
    sample = texts.take(_drawn(len(texts)))
    terms, n_rows = _vocabulary(kind, sample, beat)
    if not len(terms):
        return None
    return Space(kind, terms, (np.log((1 + len(sample)) / (1 + n_rows)) + 1).astype(np.float32))


def tfidf(terms: Terms, vocabulary: np.ndarray, idf: np.ndarray) -> sparse.csr_array:
    """[n, V] float32: (1 + log count) * idf, each row of length 1."""
    counts = terms.among(vocabulary)
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    weights = (1 + np.log(counts.data)) * idf[counts.indices].astype(np.float64)
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=counts.shape[0]))
    values = (weights / lengths[rows]).astype(np.float32)
    return sparse.csr_array((values, counts.indices, counts.indptr), shape=counts.shape)


def _drawn(n: int) -> np.ndarray:
    """[m] ascending positions: all of n, or `FIT_ROWS` of them at random."""
    if n <= FIT_ROWS:
        return np.arange(n)
    return np.sort(np.random.RandomState(0).permutation(n)[:FIT_ROWS])


def _vocabulary(kind: str, texts: pa.Array, beat: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, ascending, of the terms that are kept, and in how many texts each is; of equal ones, the smallest."""
    hashes, n_rows = np.empty(0, np.uint64), np.empty(0, np.int64)
    for terms in _cut_up(kind, texts, beat):
        hashes, n_rows = _added(hashes, n_rows, terms.hashes, terms.n_rows())
    order = np.lexsort((hashes, -n_rows))
    kept = np.sort(order[n_rows[order] >= MIN_ROWS][:VOCABULARY])
    return hashes[kept], n_rows[kept]


def _cut_up(kind: str, texts: pa.Array, beat: Callable[[], None]) -> Iterator[Terms]:
    for start in range(0, len(texts), CHUNK_ROWS):
        beat()
        yield KINDS[kind](texts[start : start + CHUNK_ROWS])


def _added(
    hashes: np.ndarray, n_rows: np.ndarray, more: np.ndarray, n_more: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, ascending, and counts of both together."""
    both, place = np.unique(np.concatenate([hashes, more]), return_inverse=True)
    return both, np.bincount(place, np.concatenate([n_rows, n_more])).astype(np.int64)
