"""Which rows train and which validate: stratified by price, near-duplicates on one side, the same for any row order."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

from fusion import log, storage
from fusion.config import RunConfig
from fusion.errors import DataError
from fusion.manifests import SPLIT
from fusion.tables import Table

N_STRATA = 10
PLACEHOLDER_ROWS = 50  # a text or vector that more rows share says "no image" or "no text", not "the same product"


def split_rows(table: Table, vectors: Mapping[str, np.ndarray], config: RunConfig) -> pd.DataFrame:
    """Side and near-duplicate group of every row.

    Args:
        table: N rows with prices, sorted by id.
        vectors: role to [N, D_role]; rows of zeros are missing.

    Returns:
        One row a sample in the table's order: sample_id, price, group (int), side ("train" or "validation").

    Raises:
        DataError: fewer groups than the split needs.
    """
    groups = near_duplicate_groups(table, vectors, config)
    validates = _validating_groups(table, groups, config)[groups]
    side = np.where(validates, "validation", "train")
    log.info(
        event="split",
        train=int((~validates).sum()),
        validation=int(validates.sum()),
        groups=int(groups.max() + 1),
        rows_in_groups=int((np.bincount(groups)[groups] > 1).sum()),
    )
    return pd.DataFrame({"sample_id": table.ids, "price": table.prices, "group": groups, "side": side})


def near_duplicate_groups(table: Table, vectors: Mapping[str, np.ndarray], config: RunConfig) -> np.ndarray:
    """[N] group of each row: rows connected by an equal text, vector or `--group-column` value share one.

    Groups are numbered in the order of their first row.
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


def _shared_values(
    table: Table, vectors: Mapping[str, np.ndarray], config: RunConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that share a value with others, and a label of that value."""
    if config.group_column is not None:
        yield _shared(_column(table, config.group_column), config.group_column, largest=len(table))
    if config.text_column in table.frame.columns:
        yield _shared(_column(table, config.text_column), config.text_column, PLACEHOLDER_ROWS)
    for role, values in vectors.items():
        yield _shared(_fingerprints(values), role, PLACEHOLDER_ROWS)


def _shared(values: np.ndarray, name: str, largest: int) -> tuple[np.ndarray, np.ndarray]:
    labels, _ = pd.factorize(values)  # None and empty text are -1
    counts = np.bincount(labels[labels >= 0])
    if (counts > largest).any():
        log.info(event="placeholder", column=name, rows=int(counts[counts > largest].sum()))
    rows = np.flatnonzero(labels >= 0)
    rows = rows[(counts[labels[rows]] > 1) & (counts[labels[rows]] <= largest)]
    return rows, labels[rows]


def _column(table: Table, name: str) -> np.ndarray:
    if name not in table.frame.columns:
        raise DataError(
            f"train.csv has no column {name!r}; it has {list(table.frame.columns)}", "correct --group-column"
        )
    text = table.frame[name].astype("object")
    return np.array([None if pd.isna(value) or not str(value).strip() else str(value).strip() for value in text])


def _fingerprints(vectors: np.ndarray) -> np.ndarray:
    def fingerprint(row: np.ndarray) -> str | None:
        return hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() if row.any() else None

    return np.array([fingerprint(row) for row in vectors], dtype=object)


def _validating_groups(table: Table, groups: np.ndarray, config: RunConfig) -> np.ndarray:
    """[G] bool: whole groups are drawn, in the order of their first id, stratified by their median price."""
    prices = pd.Series(table.prices).groupby(groups).median().to_numpy()
    n_parts = config.folds or max(2, round(1 / min(config.val_fraction, 1 - config.val_fraction)))
    if len(prices) < n_parts:
        raise DataError(
            f"{len(prices)} groups of rows cannot be split into {n_parts} parts; rows with the same text, vector or "
            "--group-column value stay together",
            "give more rows, a larger --val-fraction or fewer --folds",
        )
    ranks = pd.Series(prices).rank(method="first").to_numpy() - 1
    strata = (ranks * min(N_STRATA, len(prices) // n_parts) / len(prices)).astype(int)
    validates = np.zeros(len(prices), bool)
    validates[_drawn(strata, config)] = True
    return validates


def _drawn(strata: np.ndarray, config: RunConfig) -> np.ndarray:
    nothing = np.zeros(len(strata))
    if config.folds is not None:
        folds = StratifiedKFold(config.folds, shuffle=True, random_state=config.seed)
        return np.asarray(list(folds.split(nothing, strata))[config.fold][1])
    single = StratifiedShuffleSplit(1, test_size=config.val_fraction, random_state=config.seed)
    return np.asarray(next(single.split(nothing, strata))[1])


def read_split(run: str, sha256: str = "") -> pd.DataFrame:
    """sample_id (str) and side of every row of a run, as `to_parquet` wrote them.

    Args:
        sha256: of the bytes that the run was trained with; unknown if empty.

    Raises:
        DataError: there is none, or it is damaged.
    """
    url = storage.join(run, SPLIT)
    content = storage.read(url)
    remedy = "restore it, or train under another --run-id"
    if sha256 not in ("", storage.sha256(content)):
        raise DataError(f"{url} is not the one that the run was trained with", remedy)
    try:
        return pd.read_parquet(io.BytesIO(content)).astype({"sample_id": "str"})[["sample_id", "side"]]
    except (ValueError, OSError, KeyError) as error:  # pyarrow's errors are among them
        raise DataError(f"{url} is damaged: {str(error).splitlines()[0]}", remedy) from error


def to_parquet(split: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    split.to_parquet(buffer, index=False)
    return buffer.getvalue()
