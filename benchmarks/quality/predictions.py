"""Out-of-fold predictions of peers, cached by fold, so that a later command only computes what is missing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.quality.catalog import Catalog
from benchmarks.quality.fold import Fold, log_smape
from benchmarks.quality.inputs import Inputs, Shared
from benchmarks.quality.peers import Peer
from fusion import log
from fusion.config import digest
from fusion.errors import DataError


@dataclass(frozen=True)
class Prediction:
    """Predicted log prices of some or all rows, each by a model that was not trained on the row's group.

    Attributes:
        name: of the peer, run or blend.
        inputs: description of its inputs.
        logs: [N] log prices, NaN for rows without a prediction.
        minutes: for training and tuning; NaN if not known. Time for inputs that peers share, such as neighbours, is
            counted for the first of them.
        is_ours: whether it is a run of Fusion.
        weights: for a blend, name of each member to its weight.
    """

    name: str
    inputs: str
    logs: np.ndarray
    minutes: float = float("nan")
    is_ours: bool = False
    weights: dict[str, float] | None = None

    @property
    def covered(self) -> np.ndarray:
        """[N] bool; whether the row has a prediction."""
        return ~np.isnan(self.logs)


@dataclass(frozen=True)
class Cache:
    """A folder with one Parquet file per data, peer, settings, inputs and fold: sample_id, log_price, seconds."""

    folder: Path
    catalog: Catalog

    def file(self, name: str, peer: Peer, variant: str, fold: int) -> Path:
        texts = digest(self.catalog.texts) if "text" in variant else ""
        settings = [dict(peer.settings), peer.version(), texts]
        inputs = variant.replace(" + ", "+")
        return self.folder / self.catalog.digest[:12] / f"{name}-{inputs}-{digest(settings)[:8]}" / f"{fold}.parquet"

    def read(self, file: Path, fold: int) -> pd.DataFrame | None:
        """The fold's predictions; None if they were not computed yet.

        Raises:
            DataError: the file is damaged, or contains other rows.
        """
        if not file.exists():
            return None
        remedy = f"remove it: rm '{file}'"
        try:
            frame = pd.read_parquet(file)
        except (ValueError, OSError) as error:
            raise DataError(f"{file} is damaged: {str(error).splitlines()[0]}", remedy) from error
        if list(frame["sample_id"]) != list(self.catalog.ids[self.catalog.folds == fold]):
            raise DataError(f"{file} has other rows than fold {fold}", remedy)
        return frame

    def write(self, file: Path, fold: Fold, logs: np.ndarray, seconds: float) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame({"sample_id": self.catalog.ids[fold.held], "log_price": logs, "seconds": seconds})
        unfinished = file.with_suffix(".unfinished")
        frame.to_parquet(unfinished, index=False)
        unfinished.rename(file)


def compute(cache: Cache, name: str, peer: Peer, variant: str, shared: Shared) -> None:
    """Predicts a fold's rows, unless their predictions are cached."""
    fold, file = shared.fold, cache.file(name, peer, variant, shared.fold.number)
    if file.exists():
        return
    started = time.monotonic()
    logs = peer.learn(Inputs(shared, variant), peer.settings).astype(np.float64)
    logs = logs.clip(fold.targets.min(), fold.targets.max())
    if np.isnan(logs).any():
        raise DataError(f"{name} predicts NaN in fold {fold.number}", f"leave {name} out of --models")
    cache.write(file, fold, logs, time.monotonic() - started)
    error = log_smape(logs, cache.catalog.logs[fold.held])
    log.info(event="peer", name=name, inputs=variant, fold=fold.number, smape=error, seconds=time.monotonic() - started)


def gathered(cache: Cache, name: str, peer: Peer, variant: str) -> Prediction | None:
    """All cached predictions of a peer; None if there are none."""
    logs, seconds = np.full(len(cache.catalog.ids), np.nan), 0.0
    for fold in np.unique(cache.catalog.folds):
        frame = cache.read(cache.file(name, peer, variant, int(fold)), int(fold))
        if frame is not None:
            logs[cache.catalog.folds == fold] = frame["log_price"]
            seconds += float(frame["seconds"].iloc[0])
    found = Prediction(name, variant, logs, seconds / 60)
    return found if found.covered.any() else None
