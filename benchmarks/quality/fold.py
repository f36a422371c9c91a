"""The data of a fold that a peer may use: inputs of all rows, prices of the training rows only, and a tuning split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from benchmarks.quality.catalog import Catalog

TUNING_SHARE = 0.2  # of the training groups; the same share as that of a fold in all rows
V = TypeVar("V")


@dataclass(frozen=True)
class Fold:
    """One of the folds, without the prices of the rows to predict.

    Attributes:
        number: of the fold.
        vectors, texts: as in the catalog, of all N rows.
        train: [n] training rows.
        held: [m] rows to predict.
        targets: [n] log prices of the training rows.
        groups: [n] groups of the training rows.
        tunes: [n] bool; whether the training row is used to choose settings. It is the same for all rows of a group.
    """

    number: int
    vectors: dict[str, np.ndarray]
    texts: list[str]
    train: np.ndarray
    held: np.ndarray
    targets: np.ndarray
    groups: np.ndarray
    tunes: np.ndarray

    def targets_of(self, rows: np.ndarray) -> np.ndarray:
        """[r] log prices of some of the training rows, which are positions among all rows."""
        return self.targets[np.searchsorted(self.train, rows)]


def open_fold(catalog: Catalog, number: int) -> Fold:
    train, held = np.flatnonzero(catalog.folds != number), np.flatnonzero(catalog.folds == number)
    groups = catalog.groups[train]
    known = np.unique(groups)
    drawn = np.random.default_rng(number).permutation(known)[: max(1, int(TUNING_SHARE * len(known)))]
    targets, tunes = catalog.logs[train], np.isin(groups, drawn)
    return Fold(number, catalog.vectors, catalog.texts, train, held, targets, groups, tunes)


def log_smape(predicted: np.ndarray, targets: np.ndarray) -> float:
    """SMAPE in percent of log prices: |p - a| / ((p + a) / 2) is 2 tanh(|log p - log a| / 2)."""
    return float(200 * np.tanh(np.abs(predicted - targets) / 2).mean())


def chosen(fold: Fold, values: Iterable[V], predict: Callable[[V, np.ndarray, np.ndarray], np.ndarray]) -> V:
    """The value with the lowest SMAPE on the tuning rows.

    Args:
        predict: function of (value, training rows, rows to predict) that returns log prices of the latter. Rows are
            positions among the fold's training rows.
    """
    known, wanted = np.flatnonzero(~fold.tunes), np.flatnonzero(fold.tunes)
    losses = {value: log_smape(predict(value, known, wanted), fold.targets[wanted]) for value in values}
    return min(losses, key=lambda value: losses[value])


def n_threads() -> int:
    """Threads that a peer may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
