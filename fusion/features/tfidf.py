"""Turns texts into dense vectors: TF-IDF of one kind of terms, projected on random directions.

Texts are similar if they share rare terms. A random projection preserves the cosine of any two vectors (Johnson and
Lindenstrauss, 1984; with random signs: Achlioptas, 2003) up to about 1/sqrt(D), which is 0.04 here. A truncated SVD
would keep frequent terms and drop rare ones. The projection needs no fit, and is not stored with a run.

A `Space` is fitted on texts alone, never on prices.
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

CHUNK_ROWS = 1024  # texts tokenised at a time; takes 150 MB if each has 1,000 characters
MAX_LETTERS = 4096  # characters used of each text; bounds memory, and the longest descriptions repeat themselves
FIT_ROWS = 1 << 16  # texts used for the vocabulary; if there are more, a random sample of this size
MIN_ROWS = 2  # a term must occur in so many texts; one that occurs in a single text relates it to no other
VOCABULARY = 1 << 15  # terms kept per kind, the most frequent ones
DIM = 512  # number of random directions


@dataclass(frozen=True)
class Space:
    """The fitted TF-IDF of one kind of terms.

    Attributes:
        kind: a key of `KINDS`.
        terms: [V] uint64 hashes of the vocabulary, ascending.
        idf: [V] float32 inverse document frequency of each term.
    """

    kind: str
    terms: np.ndarray
    idf: np.ndarray

    @cached_property
    def directions(self) -> np.ndarray:
        """[V, D] float32 random signs, scaled to directions of length 1.

        They are the same with every version of NumPy, which guarantees the numbers of `RandomState` (NEP 19).
        """
        seed = list(KINDS).index(self.kind)
        signs = np.random.RandomState(seed).randint(0, 2, (len(self.terms), DIM), np.int8)
        return (2 * signs - 1).astype(np.float32) / np.float32(DIM**0.5)

    def vectors(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """[n, DIM] float32 vectors, and [n] bool whether each text has a term of the vocabulary."""
        weights = tfidf(KINDS[self.kind](texts), self.terms, self.idf)
        return np.asarray(weights @ self.directions), np.diff(weights.indptr) > 0


def shortened(texts: pa.Array) -> pa.Array:
    """The first `MAX_LETTERS` characters of each text; empty for missing texts."""
    return pc.utf8_slice_codeunits(texts.fill_null(""), 0, MAX_LETTERS)


def fit(kind: str, texts: pa.Array, beat: Callable[[], None] = lambda: None) -> Space | None:
    """Fits the TF-IDF of a kind of terms; None if no two texts share a term.

    Args:
        texts: large_string, without nulls.
        beat: called regularly, for the watchdog; it may raise an exception to stop.
    """
    sample = texts.take(_drawn(len(texts)))
    terms, n_rows = _vocabulary(kind, sample, beat)
    if not len(terms):
        return None
    return Space(kind, terms, (np.log((1 + len(sample)) / (1 + n_rows)) + 1).astype(np.float32))


def tfidf(terms: Terms, vocabulary: np.ndarray, idf: np.ndarray) -> sparse.csr_array:
    """[n, V] float32: (1 + log(count)) * idf, with each row normalised to length 1."""
    counts = terms.among(vocabulary)
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    weights = (1 + np.log(counts.data)) * idf[counts.indices].astype(np.float64)
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=counts.shape[0]))
    values = (weights / lengths[rows]).astype(np.float32)
    return sparse.csr_array((values, counts.indices, counts.indptr), shape=counts.shape)


def _drawn(n: int) -> np.ndarray:
    """[m] ascending positions of texts: all n, or a random sample of `FIT_ROWS`."""
    if n <= FIT_ROWS:
        return np.arange(n)
    return np.sort(np.random.RandomState(0).permutation(n)[:FIT_ROWS])


def _vocabulary(kind: str, texts: pa.Array, beat: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the vocabulary, ascending, and the number of texts with each term.

    Among terms that are equally frequent, those with the smallest hashes are kept.
    """
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
    """The union of two sets of hashes, ascending, with the sums of their counts."""
    both, position = np.unique(np.concatenate([hashes, more]), return_inverse=True)
    return both, np.bincount(position, np.concatenate([n_rows, n_more])).astype(np.int64)
