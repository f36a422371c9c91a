"""What a checkpoint's best weights predicted for the rows that validate: `validation.parquet`, beside the weights.

Intervals, comparisons and ensembles are made of these rows, for no training step saw them. Beside the price a row may
have a category, and what the model computes of it that intervals use.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pandas as pd

from fusion.errors import DataError
from fusion.records import manifests
from fusion.records.manifests import VALIDATION, Checkpoint

COMPUTED = ("spread",)  # by the model, beside the price: some models do


def validation_of(checkpoint: Checkpoint) -> pd.DataFrame:
    """sample_id (str), price and predicted (dollars, float64) of every row that validates, sorted by sample_id.

    Where there are: spread (float64), and category (text, empty where it is missing).

    Raises:
        DataError: the checkpoint has none, for an earlier version made it, or they are damaged.
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
    """What `validation.parquet` holds.

    Args:
        ids: [n] in the order of the split.
        prices: [n] dollars.
        computed, category: as of `computed_frame`.
    """
    frame = computed_frame(computed, category)
    frame.insert(0, "price", prices)
    frame.insert(0, "sample_id", ids)
    return frame


def computed_frame(computed: Mapping[str, np.ndarray], category: pd.Series | None = None) -> pd.DataFrame:
    """What intervals need of rows: predicted, and where there are, spread and category.

    Args:
        computed: name to [n, …]; price in dollars, and perhaps one of `COMPUTED`.
        category: [n] text.
    """
    others = {name: computed[name] for name in COMPUTED if name in computed}
    frame = pd.DataFrame({"predicted": computed["price"], **others})
    return frame if category is None else frame.assign(category=category.to_numpy())


def computed_in(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """What the model computed of the rows: `computed` of `validation_frame`."""
    others = {name: frame[name].to_numpy() for name in COMPUTED if name in frame}
    return {"price": frame["predicted"].to_numpy(), **others}


def to_parquet(frame: pd.DataFrame) -> bytes:
    """The frame as Parquet; the same bytes for the same rows."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def from_parquet(data: bytes) -> pd.DataFrame:
    """The rows that `to_parquet` wrote.

    Raises:
        ValueError: it is no Parquet file, or lacks a column.
    """
    try:
        frame = pd.read_parquet(io.BytesIO(data))
        return frame.astype({"sample_id": "str", "price": np.float64, "predicted": np.float64})
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
