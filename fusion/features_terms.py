"""The terms of texts, as 64-bit hashes: words and pairs of words, pieces of words, and short lines "Label: value".

A whole chunk of texts is cut up in Arrow's and NumPy's compiled code: a Python function called for each term, as the
vectorizers of scikit-learn do it, takes fifteen times as long. Hashes of 64 bits stand for the terms: two of a million
terms share one in 1 of 30 million catalogs, and a vocabulary of hashes is an array like any other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusion.text_hashes import mixed, text_hashes

# Row of each term, ascending, and its hash; a term that occurs several times in a text is there several times.
Terms = tuple[np.ndarray, np.ndarray]

_BETWEEN_WORDS = r"[^\pL\pN]+"
_FIELD = r"^\s*(?P<label>[^:]{1,40}?)\s*:\s*(?P<value>\S.{0,59}?)\s*$"  # longer values are sentences, not properties
PIECES = (3, 4, 5)  # letters of a piece of a word, as usual for TF-IDF of characters
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with its bits well spread (the golden ratio)
_SPACE = ord(" ")


def words(texts: pa.Array) -> Terms:
    """Words of letters and digits, small, and pairs of neighbouring words."""
    rows, flat = _flattened(pc.split_pattern_regex(pc.utf8_lower(texts), _BETWEEN_WORDS))
    hashes = text_hashes(flat)
    rows, hashes = rows[hashes > 0], hashes[hashes > 0]
    is_pair = rows[1:] == rows[:-1]
    pairs = mixed(mixed(hashes[:-1]) * _FACTOR + hashes[1:])[is_pair]
    return _by_row(np.concatenate([rows, rows[1:][is_pair]]), np.concatenate([hashes, pairs]))


def chars(texts: pa.Array) -> Terms:
    """Runs of 3 to 5 letters within the words, which have a space at either end."""
    cleaned = pc.replace_substring_regex(pc.utf8_lower(texts), _BETWEEN_WORDS, " ")
    space = _text(" ")
    padded = pc.binary_join_element_wise(space, cleaned, space, _text(""))
    letters = np.frombuffer("".join(padded.to_pylist()).encode("utf-32-le"), np.uint32)
    row_of = np.repeat(np.arange(len(padded)), pc.utf8_length(padded).to_numpy())
    found = [_runs(letters, row_of, length) for length in PIECES]
    return _by_row(np.concatenate([rows for rows, _ in found]), np.concatenate([hashes for _, hashes in found]))


def fields(texts: pa.Array) -> Terms:
    """Lines such as "Brand: Alder", small and without space around label and value."""
    rows, lines = _flattened(pc.split_pattern(pc.utf8_lower(texts), "\n"))
    found = pc.extract_regex(lines, _FIELD)
    hashes = text_hashes(pc.binary_join_element_wise(*found.flatten(), _text(":")))
    return rows[hashes > 0], hashes[hashes > 0]


KINDS: dict[str, Callable[[pa.Array], Terms]] = {"words": words, "chars": chars, "fields": fields}


def counted(terms: Terms, vocabulary: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, position in the vocabulary and count of each known term of each row; by row, then by position.

    Args:
        vocabulary: [V] hashes, ascending.
    """
    rows, hashes = terms
    if not len(vocabulary):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    place = np.searchsorted(vocabulary, hashes).clip(max=len(vocabulary) - 1)
    known = vocabulary[place] == hashes
    keys, counts = np.unique(rows[known] * len(vocabulary) + place[known], return_counts=True)
    return keys // len(vocabulary), keys % len(vocabulary), counts


def row_counts(terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Each different term, ascending, and the number of rows that have it."""
    order = np.lexsort(terms)
    rows, hashes = terms[0][order], terms[1][order]
    is_other = np.ones(len(rows), bool)
    is_other[1:] = (rows[1:] != rows[:-1]) | (hashes[1:] != hashes[:-1])
    return np.unique(hashes[is_other], return_counts=True)


def _text(value: str) -> pa.Scalar:
    return pa.scalar(value, pa.large_string())


def _flattened(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Row of each element of a list array, and the elements."""
    return np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy()), pc.list_flatten(lists)


def _runs(letters: np.ndarray, row_of: np.ndarray, length: int) -> Terms:
    """Row and hash of each run of letters with spaces at its ends only."""
    if len(letters) < length:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(letters, length)
    is_within = (windows[:, 1:-1] != _SPACE).all(axis=1)
    hashes = np.full(int(is_within.sum()), length, np.uint64)
    for place in range(length):
        hashes = hashes * _FACTOR + windows[is_within, place]
    return row_of[: len(windows)][is_within], mixed(mixed(hashes))


def _by_row(rows: np.ndarray, hashes: np.ndarray) -> Terms:
    order = np.argsort(rows, kind="stable")
    return rows[order], hashes[order]
