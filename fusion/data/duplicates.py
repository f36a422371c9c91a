"""Near-duplicates of a table: rows that share a text, a vector of a source or the value of a column."""

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
from fusion.data.text_hashes import mixed, text_hashes

PLACEHOLDER_ROWS = 50  # a text or vector that more rows share says "no image" or "no text", not "the same product"
TEXT_COLUMN = "catalog_content"  # the one that is used where the settings name none
CHUNK_NUMBERS = 1 << 19  # numbers hashed at a time: with what is computed of them, 16 MiB
# Names that a column of texts often has, to be pointed out where the table has none of the usual name.
LIKELY_TEXTS = ("title", "text", "name", "description", "product_name", "item_name", "content")


def near_duplicate_groups(table: Table, vectors: Mapping[str, np.ndarray], config: RunConfig) -> np.ndarray:
    """[N] group of each row: rows connected by an equal text, vector or `--group-column` value share one.

    Groups are numbered in the order of their first row.

    Args:
        table: N rows, with the columns `compared_columns(config)`, or their hashes, where the file has them.
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
    """[N] the same number for equal values, without space around them; -1 where no other row has the value, or none.

    Args:
        values: texts, or what `read_table` kept of them: their hashes.
    """
    hashes = values.to_numpy() if values.dtype == np.uint64 else text_hashes(pa.array(values))
    return _labels(hashes)


def _labels(hashes: np.ndarray) -> np.ndarray:
    """[N] the same number for equal hashes [N] uint64, in their order; -1 for 0 and for those that are unique.

    Sorting takes a copy of the hashes; a hash table of them would take five times as much, at random places.
    """
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    repeated = repeated[repeated > 0]
    if not len(repeated):
        return np.full(len(hashes), -1)
    place = np.searchsorted(repeated, hashes).clip(max=len(repeated) - 1)
    return np.where(repeated[place] == hashes, place, -1)


def vector_labels(vectors: np.ndarray) -> np.ndarray:
    """[N] the same number for rows [N, D] with the same bytes; -1 for rows of zeros and for those that are unique."""
    if not vectors.size:
        return np.full(len(vectors), -1)
    labels = _labels(_row_hashes(vectors))
    shared = np.flatnonzero(labels >= 0)
    first = np.full(int(labels.max()) + 1, len(labels))
    np.minimum.at(first, labels[shared], shared)
    for rows in _chunks(shared, vectors.shape[1]):
        is_other = (vectors[rows] != vectors[first[labels[rows]]]).any(axis=1)
        # Two vectors of one hash: at 10 million rows once in thousands of tables. One of them then counts as unique.
        labels[rows[is_other]] = -1
    return labels


def _row_hashes(vectors: np.ndarray) -> np.ndarray:
    """[N] uint64 of the bytes of each row: multilinear hashing (Carter and Wegman, 1979); 0 for rows of zeros."""
    n_rows, dim = vectors.shape
    weights = np.random.default_rng(0).integers(0, 2**64, dim, np.uint64) | np.uint64(1)
    hashes = np.zeros(n_rows, np.uint64)
    for rows in _chunks(np.arange(n_rows), dim):
        chunk = np.ascontiguousarray(vectors[rows[0] : rows[-1] + 1])
        words = mixed(chunk.view(f"u{chunk.dtype.itemsize}").astype(np.uint64))
        found = (words * weights).sum(axis=1, dtype=np.uint64)
        hashes[rows] = np.where(chunk.any(axis=1), found | np.uint64(1), 0)
    return hashes


def _chunks(rows: np.ndarray, dim: int) -> list[np.ndarray]:
    """Consecutive parts of `rows`, each of about `CHUNK_NUMBERS` numbers; none for no rows."""
    return np.array_split(rows, -(-len(rows) * dim // CHUNK_NUMBERS)) if len(rows) else []
