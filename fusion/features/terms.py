"""Extracts terms from texts, as 64-bit hashes: words and pairs of words, character n-grams, and lines "Label: value".

A chunk of texts is tokenised in the compiled code of Arrow, NumPy and SciPy, and each distinct word is processed once.
scikit-learn's vectorizers call a Python function per term, and take twenty times as long. Terms are represented by
hashes of 64 bits, so that a vocabulary is a plain array. Two of a million terms have the same hash in one of 30 million
catalogs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from fusion.data.text_hashes import mix_bits, text_hashes

_BETWEEN_WORDS = r"[^\pL\pN]+"
# A line "Label: value". Longer labels and values are usually sentences instead of properties.
_FIELD = r"^\s*(?P<label>[^:]{1,40}?)\s*:\s*(?P<value>\S.{0,59}?)\s*$"
PIECES = (3, 4, 5)  # lengths of character n-grams; a common choice for TF-IDF
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: an odd multiplier that spreads bits well
_SPACE = ord(" ")


@dataclass(frozen=True)
class Terms:
    """The terms of n texts.

    Attributes:
        hashes: [T] uint64, ascending and unique.
        counts: [n, T] how often each text contains each term.
    """

    hashes: np.ndarray
    counts: sparse.csr_array

    def n_rows(self) -> np.ndarray:
        """[T] number of texts that contain each term."""
        return np.bincount(self.counts.indices, minlength=len(self.hashes))

    def among(self, vocabulary: np.ndarray) -> sparse.csr_array:
        """[n, V] counts of the terms of a vocabulary [V] uint64, which is ascending; each row's indices are sorted."""
        position = np.searchsorted(vocabulary, self.hashes).clip(max=max(0, len(vocabulary) - 1))
        known = np.flatnonzero(np.isin(self.hashes, vocabulary))
        kept = self.counts[:, known]
        shape = (kept.shape[0], len(vocabulary))
        found = sparse.csr_array((kept.data, position[known][kept.indices], kept.indptr), shape=shape)
        found.sort_indices()
        return found


def words(texts: pa.Array) -> Terms:
    """Words of letters and digits, in lower case, and pairs of neighbouring words."""
    rows, tokens = _words(texts)
    hashes = text_hashes(tokens.dictionary)[tokens.indices.to_numpy()]
    is_pair = rows[1:] == rows[:-1]
    pairs = mix_bits(mix_bits(hashes[:-1]) * _FACTOR + hashes[1:])[is_pair]
    return _counted(np.concatenate([rows, rows[1:][is_pair]]), np.concatenate([hashes, pairs]), len(texts))


def chars(texts: pa.Array) -> Terms:
    """Character n-grams (see `PIECES`) within words, where each word is padded with a space at both ends."""
    rows, tokens = _words(texts)
    shape = (len(texts), len(tokens.dictionary))
    of_texts = sparse.csr_array((np.ones(len(rows)), (rows, tokens.indices.to_numpy())), shape=shape)
    of_words = _pieces(tokens.dictionary)
    return Terms(of_words.hashes, of_texts @ of_words.counts)


def fields(texts: pa.Array) -> Terms:
    """Lines such as "Brand: Alder", in lower case, with label and value trimmed."""
    rows, lines = _flattened(pc.split_pattern(pc.utf8_lower(texts), "\n"))
    found = pc.extract_regex(lines, _FIELD)
    hashes = text_hashes(pc.binary_join_element_wise(*found.flatten(), _text(":")))
    return _counted(rows[hashes > 0], hashes[hashes > 0], len(texts))


KINDS: dict[str, Callable[[pa.Array], Terms]] = {"words": words, "chars": chars, "fields": fields}


def _words(texts: pa.Array) -> tuple[np.ndarray, pa.DictionaryArray]:
    """The row of each word, ascending, and the words."""
    rows, found = _flattened(pc.split_pattern_regex(pc.utf8_lower(texts), _BETWEEN_WORDS))
    is_word = pc.not_equal(found, "")
    return rows[is_word.to_numpy(zero_copy_only=False)], pc.dictionary_encode(found.filter(is_word))


def _pieces(words: pa.Array) -> Terms:
    space = _text(" ")
    padded = pc.binary_join_element_wise(space, words, space, _text(""))
    letters = np.frombuffer("".join(padded.to_pylist()).encode("utf-32-le"), np.uint32)
    row_of = np.repeat(np.arange(len(padded)), pc.utf8_length(padded).to_numpy())
    rows, hashes = zip(*(_runs(letters, row_of, length) for length in PIECES), strict=True)
    return _counted(np.concatenate(rows), np.concatenate(hashes), len(words))


def _runs(letters: np.ndarray, row_of: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and hash of each n-gram of this length that lies within one padded word: spaces only at its ends."""
    if len(letters) < length:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(letters, length)
    is_within = (windows[:, 1:-1] != _SPACE).all(axis=1)
    hashes = np.full(int(is_within.sum()), length, np.uint64)
    for position in range(length):
        hashes = hashes * _FACTOR + windows[is_within, position]
    return row_of[: len(windows)][is_within], mix_bits(mix_bits(hashes))


def _counted(rows: np.ndarray, hashes: np.ndarray, n_rows: int) -> Terms:
    unique, column = np.unique(hashes, return_inverse=True)
    counts = sparse.coo_array((np.ones(len(rows)), (rows, column)), shape=(n_rows, len(unique)))
    return Terms(unique, sparse.csr_array(counts))


def _flattened(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """The row of each element of a list array, and the elements."""
    return np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy()), pc.list_flatten(lists)


def _text(value: str) -> pa.Scalar:
    return pa.scalar(value, pa.large_string())
