"""Reads and writes `validation.parquet` of a checkpoint: what its weights predict for the validation rows.

No training step saw these rows, so prediction intervals are fitted to them, runs are compared on them, and the weights
of ensembles are fitted to them. Besides the prices, the file has what intervals use: the category of the row, and the
model's spread.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pandas as pd

from fusion.errors import DataError
from fusion.records import manifests
from fusion.records.manifests import VALIDATION, Checkpoint

COMPUTED = ("spread",)  # columns that only some models compute in addition to the price: those with neighbours


def validation_of(checkpoint: Checkpoint) -> pd.DataFrame:
    """Reads the validation rows, sorted by sample_id: sample_id (str), price and predicted (dollars, float64).

    Optional columns are spread (float64), and category (text, empty where it is missing).

    Raises:
        DataError: the file is damaged, or the checkpoint has none: it was made before the first validation, or by an
            earlier version.
    """
    if not has_validation(checkpoint):
        raise DataError(
            f"{checkpoint.url} has no {VALIDATION}: it was made before its first validation, or by an earlier version",
            "let its training finish, or train under another --run-id",
        )
    data = manifests.read_file(checkpoint, VALIDATION)
    try:
        return from_parquet(data)
    except ValueError as error:
        raise DataError(
            f"{checkpoint.url}/{VALIDATION} is damaged: {error}", "`python -m fusion.verify URL` says what else is"
        ) from error


def has_validation(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has predictions of its validation rows."""
    return bool(checkpoint.manifest.sha256_of(VALIDATION))


def validation_frame(
    ids: pd.Index, prices: np.ndarray, computed: Mapping[str, np.ndarray], category: pd.Series | None = None
) -> pd.DataFrame:
    """The table that `validation.parquet` holds.

    Args:
        ids: [n] sample ids, in the order of the split.
        prices: [n] true prices in dollars.
        computed, category: as for `computed_frame`.
    """
    frame = computed_frame(computed, category)
    frame.insert(0, "price", prices)
    frame.insert(0, "sample_id", ids)
    return frame


def computed_frame(computed: Mapping[str, np.ndarray], category: pd.Series | None = None) -> pd.DataFrame:
    """The columns that intervals are computed from: predicted and, if given, spread and category.

    Args:
        computed: name to [n, …], as the model returns them: "price" in dollars, and perhaps those in `COMPUTED`; others
            are ignored.
        category: [n] text.
    """
    others = {name: computed[name] for name in COMPUTED if name in computed}
    frame = pd.DataFrame({"predicted": computed["price"], **others})
    return frame if category is None else frame.assign(category=category.to_numpy())


def computed_in(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """The inverse of `computed_frame`: name to [n], as the model returned them."""
    others = {name: frame[name].to_numpy() for name in COMPUTED if name in frame}
    return {"price": frame["predicted"].to_numpy(), **others}


def to_parquet(frame: pd.DataFrame) -> bytes:
    """The frame as Parquet; the same rows always give the same bytes."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def from_parquet(data: bytes) -> pd.DataFrame:
    """Reads the rows that `to_parquet` wrote.

    Raises:
        ValueError: the bytes are not a Parquet file, or a column is missing.
    """
    try:
        frame = pd.read_parquet(io.BytesIO(data))
        return frame.astype({"sample_id": "str", "price": np.float64, "predicted": np.float64})
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
