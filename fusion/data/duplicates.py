"""Finds near-duplicates in a table: rows with the same text, the same vector in a source, or the same column value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fusion import log
from fusion.config import RunConfig
from fusion.data.tables import Table
from fusion.data.text_hashes import mix_bits, text_hashes

# A text or vector that more rows share is a placeholder, such as "no image", and does not make rows near-duplicates.
# Variants and re-listings of one product are rarely so many; if they are, `--group-column` keeps them together.
PLACEHOLDER_ROWS = 50
TEXT_COLUMN = "catalog_content"  # the text column if `--text-column` is not given
# Numbers hashed at a time. With all intermediate results they take 2 MiB, which fits in a cache of the processor: eight
# times as many take 2.6 times as long per number.
CHUNK_NUMBERS = 1 << 16
# Common names of text columns; the hint suggests one of them if the table has no TEXT_COLUMN.
LIKELY_TEXTS = ("title", "text", "name", "description", "product_name", "item_name", "content")


def near_duplicate_groups(table: Table, vectors: Mapping[str, np.ndarray], config: RunConfig) -> np.ndarray:
    """[N] group of each row. Rows with an equal text, vector or `--group-column` value are in one group, transitively.

    The groups are the connected components of a bipartite graph between rows and shared values. They are numbered in
    the order of their first row.

    Args:
        table: N rows with the columns of `compared_columns(config)`, or their uint64 hashes; columns that the file
            lacks are absent.
        vectors: role to [N, D_role]; rows of zeros are missing embeddings. Or role to their `vector_hashes` [N], which
            are taken for the vectors.

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
    """Names of the table's columns whose equal values make rows near-duplicates."""
    return [config.text_column or TEXT_COLUMN, *([config.group_column] if config.group_column else [])]


def _shared_values(
    table: Table, vectors: Mapping[str, np.ndarray], config: RunConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each column and source: the rows that share a value with other rows, and a label of that value for each."""
    if config.group_column is not None:
        column = table.column(config.group_column, "--group-column")
        yield _shared(_text_labels(column), config.group_column, largest=len(table))
    text = _texts(table, config)
    if text is not None:
        yield _shared(_text_labels(text), str(text.name), PLACEHOLDER_ROWS)
    for role, values in vectors.items():
        labels = vector_labels(values) if values.ndim > 1 else _labels(values)
        yield _shared(labels, role, PLACEHOLDER_ROWS)


def _texts(table: Table, config: RunConfig) -> pd.Series | None:
    if config.text_column is not None:
        return table.column(config.text_column, "--text-column")
    if TEXT_COLUMN in table.frame.columns:
        return table.column(TEXT_COLUMN, "--text-column")
    likely = [name for name in table.columns if name.lower() in LIKELY_TEXTS]
    log.warning(
        event="texts_not_compared",
        reason=f"{table.name} has no column {TEXT_COLUMN!r}, so rows with equal texts may be split between both sides",
        hint=f"name the column with --text-column {likely[0] if likely else 'NAME'}",
    )
    return None


def _shared(labels: np.ndarray, name: str, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose label at least 2 and at most `largest` rows have, and their labels. A label of -1 is none."""
    counts = np.bincount(labels[labels >= 0])
    if (counts > largest).any():
        log.info(event="placeholder", column=name, rows=int(counts[counts > largest].sum()))
    rows = np.flatnonzero(labels >= 0)
    rows = rows[(counts[labels[rows]] > 1) & (counts[labels[rows]] <= largest)]
    return rows, labels[rows]


def _text_labels(values: pd.Series) -> np.ndarray:
    """[N] a label for each value, equal for values that are equal after trimming; -1 for unique and missing values.

    Args:
        values: texts, or their hashes where `read_table` only kept these.
    """
    hashes = values.to_numpy() if values.dtype == np.uint64 else text_hashes(pa.array(values))
    return _labels(hashes)


def _labels(hashes: np.ndarray) -> np.ndarray:
    """[N] a label for each hash [N] uint64, ascending with the hash; -1 for the hash 0 and for unique hashes.

    This sorts a copy of the hashes. A hash table would need five times the memory, with random access.
    """
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    repeated = repeated[repeated > 0]
    if not len(repeated):
        return np.full(len(hashes), -1)
    label = np.searchsorted(repeated, hashes).clip(max=len(repeated) - 1)
    return np.where(repeated[label] == hashes, label, -1)


def vector_labels(vectors: np.ndarray) -> np.ndarray:
    """[N] a label for each row of [N, D], equal for rows of equal bytes; -1 for rows of zeros and for unique rows."""
    if not vectors.size:
        return np.full(len(vectors), -1)
    labels = _labels(vector_hashes(vectors))
    shared = np.flatnonzero(labels >= 0)
    first = np.full(int(labels.max()) + 1, len(labels))
    np.minimum.at(first, labels[shared], shared)
    for rows in _chunks(shared, vectors.shape[1]):
        is_other = (vectors[rows] != vectors[first[labels[rows]]]).any(axis=1)
        # Different vectors with the same hash occur in about one in several thousand tables of 10 million rows. One
        # of the two then counts as unique.
        labels[rows[is_other]] = -1
    return labels


def vector_hashes(vectors: np.ndarray) -> np.ndarray:
    """[N] uint64 hash of the bytes of each row, by multilinear hashing (Carter and Wegman, 1979); 0 for rows of zeros.

    Hashes of other rows have their lowest bit set, so that they are not 0.
    """
    n_rows, dim = vectors.shape
    weights = np.random.default_rng(0).integers(0, 2**64, dim, np.uint64) | np.uint64(1)
    hashes = np.zeros(n_rows, np.uint64)
    for rows in _chunks(np.arange(n_rows), dim):
        chunk = np.ascontiguousarray(vectors[rows[0] : rows[-1] + 1])
        words = mix_bits(chunk.view(f"u{chunk.dtype.itemsize}").astype(np.uint64))
        found = (words * weights).sum(axis=1, dtype=np.uint64)
        hashes[rows] = np.where(chunk.any(axis=1), found | np.uint64(1), 0)
    return hashes


def _chunks(rows: np.ndarray, dim: int) -> list[np.ndarray]:
    """`rows` in consecutive chunks, each with about `CHUNK_NUMBERS` numbers; an empty list without rows."""
    return np.array_split(rows, -(-len(rows) * dim // CHUNK_NUMBERS)) if len(rows) else []
