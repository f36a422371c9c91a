"""Near-duplicates of a table: rows that share a text, a vector of a source or the value of a column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fusion import log
from fusion.config import RunConfig
from fusion.tables import Table

PLACEHOLDER_ROWS = 50  # a text or vector that more rows share says "no image" or "no text", not "the same product"
TEXT_COLUMN = "catalog_content"  # the one that is used where the settings name none
CHUNK_NUMBERS = 1 << 22  # numbers hashed at a time: 32 MiB of them
CHUNK_ROWS = 1 << 13  # texts hashed at a time: 328 MB if all have 40,000 letters
WORD = 8  # bytes of a text that are hashed at a time
# Names that a column of texts often has, to be pointed out where the table has none of the usual name.
LIKELY_TEXTS = ("title", "text", "name", "description", "product_name", "item_name", "content")


def near_duplicate_groups(table: Table, vectors: Mapping[str, np.ndarray], config: RunConfig) -> np.ndarray:
    """[N] group of each row: rows connected by an equal text, vector or `--group-column` value share one.

    Groups are numbered in the order of their first row.

    Args:
        table: N rows, with the columns `text_columns(config)` where the file has them.
        vectors: role to [N, D_role]; rows of zeros are missing.

    Raises:
        DataError: a column that the settings name does not exist.
    """
    rows, labels, n_labels = [np.arange(0)], [np.arange(0)], 0
    for found_rows, found_labels in _shared_values(table, vectors, config):
        rows.append(found_rows)
        labels.append(found_labels + n_labels)
        n_labels += int(found_labels.max(initial=-1)) + 1
    row, label = np.concatenate(rows), np.concatenate(labels) + len(table)
    n_nodes = len(table) + n_labels
    links = coo_array((np.ones(len(row), np.int8), (row, label)), shape=(n_nodes, n_nodes))
    _, component = connected_components(links, directed=False)
    groups: np.ndarray = pd.factorize(component[: len(table)])[0]
    return groups


def compared_columns(config: RunConfig) -> list[str]:
    """Columns of the table that decide which rows are near-duplicates."""
    return [config.text_column or TEXT_COLUMN, *([config.group_column] if config.group_column else [])]


def _shared_values(
    table: Table, vectors: Mapping[str, np.ndarray], config: RunConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that share a value with others, and a label of that value."""
    if config.group_column is not None:
        column = table.column(config.group_column, "--group-column")
        yield _shared(_text_labels(column), config.group_column, largest=len(table))
    text = _texts(table, config)
    if text is not None:
        yield _shared(_text_labels(text), str(text.name), PLACEHOLDER_ROWS)
    for role, values in vectors.items():
        yield _shared(vector_labels(values), role, PLACEHOLDER_ROWS)


def _texts(table: Table, config: RunConfig) -> pd.Series | None:
    if config.text_column is not None:
        return table.column(config.text_column, "--text-column")
    if TEXT_COLUMN in table.frame.columns:
        return table.column(TEXT_COLUMN, "--text-column")
    likely = [name for name in table.columns if name.lower() in LIKELY_TEXTS]
    log.warning(
        event="texts_not_compared",
        reason=f"{table.name} has no column {TEXT_COLUMN!r}, so products with equal texts may be on both sides",
        hint=f"name the column with --text-column {likely[0] if likely else 'NAME'}",
    )
    return None


def _shared(labels: np.ndarray, name: str, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose label others have too, but not more than `largest`, and these labels; -1 is no label."""
    counts = np.bincount(labels[labels >= 0])
    if (counts > largest).any():
        log.info(event="placeholder", column=name, rows=int(counts[counts > largest].sum()))
    rows = np.flatnonzero(labels >= 0)
    rows = rows[(counts[labels[rows]] > 1) & (counts[labels[rows]] <= largest)]
    return rows, labels[rows]


def _text_labels(values: pd.Series) -> np.ndarray:
    """[N] the same number for equal values, without space around them; -1 where there is none."""
    array = pa.array(values)
    array = array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])
    if not pa.types.is_large_string(array.type):
        array = _as_texts(array)
    parts = [_text_hashes(array.slice(start, CHUNK_ROWS)) for start in range(0, len(array), CHUNK_ROWS)]
    hashes = np.concatenate([np.empty(0, np.uint64), *parts])
    # Two texts of one hash, once in 300,000 tables of 10 million rows, would only stay on one side together.
    return np.where(hashes == 0, -1, pd.factorize(hashes)[0])


def _text_hashes(texts: pa.ChunkedArray) -> np.ndarray:
    """[N] uint64 of the trimmed texts, from their words of 8 bytes and the places of these; 0 for none and empty."""
    trimmed = pa.concat_arrays(pc.utf8_trim_whitespace(texts).fill_null("").chunks)
    _, offsets, letters = trimmed.buffers()
    bounds = np.frombuffer(offsets, np.int64)[trimmed.offset :][: len(trimmed) + 1]
    lengths = np.diff(bounds)
    n_words = -(-lengths // WORD)
    ends = np.cumsum(n_words)
    if not ends[-1]:
        return np.zeros(len(lengths), np.uint64)
    place = np.arange(ends[-1]) - np.repeat(ends - n_words, n_words)
    padded = np.concatenate([np.frombuffer(letters, np.uint8)[: bounds[-1]], np.zeros(WORD, np.uint8)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WORD)
    words = windows[np.repeat(bounds[:-1], n_words) + WORD * place].view("<u8")[:, 0]
    n_beyond = (WORD - (np.repeat(lengths, n_words) - WORD * place)).clip(0)  # bytes of a last word after the text
    words &= np.uint64(2**64 - 1) >> (8 * n_beyond).astype(np.uint64)
    mixed = _mixed(_mixed(words) ^ _mixed(_mixed(place.astype(np.uint64) + np.uint64(1))))
    hashes = np.zeros(len(lengths), np.uint64)
    filled = n_words > 0
    hashes[filled] = np.add.reduceat(mixed, (ends - n_words)[filled])
    hashes += _mixed(lengths.astype(np.uint64))
    return np.where(filled, hashes | np.uint64(1), np.uint64(0))


def _as_texts(array: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return array.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # lists and structs, for one, have no text of their own
        texts = [None if value is None else str(value) for value in array.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.large_string())])


def vector_labels(vectors: np.ndarray) -> np.ndarray:
    """[N] the same number for rows [N, D] with the same bytes; -1 for rows of zeros, and for some that are unique."""
    if not vectors.size:
        return np.full(len(vectors), -1)
    hashes = _row_hashes(vectors)
    labels, _ = pd.factorize(hashes)
    first = np.full(int(labels.max()) + 1, len(labels))
    np.minimum.at(first, labels, np.arange(len(labels)))
    shared = np.flatnonzero(np.bincount(labels)[labels] > 1)
    is_other = np.zeros(len(labels), bool)
    for rows in _chunks(shared, vectors.shape[1]):
        is_other[rows] = (vectors[rows] != vectors[first[labels[rows]]]).any(axis=1)
    # Two vectors of one hash: at 10 million rows once in thousands of tables. One of them then counts as unique.
    return np.where(is_other | (hashes == 0), -1, labels)


def _row_hashes(vectors: np.ndarray) -> np.ndarray:
    """[N] uint64 of the bytes of each row: multilinear hashing (Carter and Wegman, 1979); 0 for rows of zeros."""
    n_rows, dim = vectors.shape
    weights = np.random.default_rng(0).integers(0, 2**64, dim, np.uint64) | np.uint64(1)
    hashes = np.zeros(n_rows, np.uint64)
    for rows in _chunks(np.arange(n_rows), dim):
        chunk = np.ascontiguousarray(vectors[rows[0] : rows[-1] + 1])
        words = _mixed(chunk.view(f"u{chunk.dtype.itemsize}").astype(np.uint64))
        found = (words * weights).sum(axis=1, dtype=np.uint64)
        hashes[rows] = np.where(chunk.any(axis=1), found | np.uint64(1), 0)
    return hashes


def _chunks(rows: np.ndarray, dim: int) -> list[np.ndarray]:
    """Consecutive parts of `rows`, each of about `CHUNK_NUMBERS` numbers; none for no rows."""
    return np.array_split(rows, -(-len(rows) * dim // CHUNK_NUMBERS)) if len(rows) else []


def _mixed(words: np.ndarray) -> np.ndarray:
    """Spreads the bits of each word over all 64: float16 in a float32 has its low 13 bits at zero (splitmix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    spread: np.ndarray = words ^ (words >> np.uint64(27))
    return spread
