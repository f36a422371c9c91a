"""The rows on which everything is measured, and their folds: those on which `train --folds 5 --fold k` validates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fusion.config import RunConfig, digest
from fusion.data.duplicates import TEXT_COLUMN, near_duplicate_groups
from fusion.data.embeddings import load
from fusion.data.row_store import RowStore
from fusion.data.splits import split_rows
from fusion.data.tables import Table, read_table
from fusion.distributed.world import join_world
from fusion.errors import ConfigError


@dataclass(frozen=True)
class Catalog:
    """N priced rows with their embeddings.

    Attributes:
        ids: [N] in the order of `read_table`.
        prices: [N] dollars.
        groups: [N] from `near_duplicate_groups`.
        folds: [N] the fold in which the row validates.
        vectors: role to [N, D_role] float32, NaN where the row lacks the source.
        texts: [N], empty unless they were requested.
        digest: a digest of all of these except the texts.
    """

    ids: pd.Index
    prices: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    vectors: dict[str, np.ndarray]
    texts: list[str]
    digest: str

    @property
    def logs(self) -> np.ndarray:
        """[N] natural logarithms of the prices."""
        return np.log(self.prices)


def read_catalog(config: RunConfig, sources: Mapping[str, str], *, with_text: bool) -> Catalog:
    """Reads rows, embeddings and, on request, texts, and draws the folds.

    Args:
        config: where the data are, the number of folds and their seed, and the columns that define near-duplicates.
        sources: role to the name of its source.

    Raises:
        FusionError: as for the commands, if the data are invalid.
    """
    per_fold = [name for name in sources.values() if "{fold}" in name]
    if per_fold:
        raise ConfigError(
            f"the source {per_fold[0]!r} differs between folds, but peers use the same embeddings for all folds",
            "leave it out of --sources",
        )
    table = read_table(config.data, "train", priced=True, drop_bad_prices=config.drop_bad_prices)
    with join_world("cpu") as world:
        store = load(config.data, "train", sources, table.ids, world, max_missing=config.max_missing)
    groups = near_duplicate_groups(table, {role: values.numpy() for role, values in store.values.items()}, config)
    texts = _texts(table, config) if with_text else []
    key = digest([table.digest(), store.digest, _sha256(groups), config.folds, config.seed])
    folds = split_rows(table, groups, config)["fold"].to_numpy(np.int64)
    return Catalog(table.ids, table.prices, groups, folds, _vectors(store), texts, key)


def _vectors(store: RowStore) -> dict[str, np.ndarray]:
    vectors = {role: values.float().numpy() for role, values in store.values.items()}
    for role, present in store.present.items():
        vectors[role][~present.numpy()] = np.nan
    return vectors


def _texts(table: Table, config: RunConfig) -> list[str]:
    column = table.column(config.text_column or TEXT_COLUMN, "--text-column")
    return [text if isinstance(text, str) else "" for text in column]


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype(np.int64).tobytes()).hexdigest()
