"""What a checkpoint's best weights predicted for the rows that validate: `validation.parquet`, beside the weights.

Intervals, comparisons and ensembles are made of these rows, for no training step saw them.
"""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from fusion import manifests
from fusion.errors import DataError
from fusion.manifests import VALIDATION, Checkpoint

COLUMNS = ["sample_id", "price", "predicted"]


def validation_of(checkpoint: Checkpoint) -> pd.DataFrame:
    """sample_id (str), price and predicted (dollars, float64) of every row that validates, sorted by sample_id.

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


def validation_frame(ids: pd.Index, prices: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """What `validation.parquet` holds: ids [n] in the order of the split, prices [n] and predictions [n] in dollars."""
    return pd.DataFrame({"sample_id": ids, "price": prices, "predicted": predicted})


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
        frame = pd.read_parquet(io.BytesIO(data), columns=COLUMNS)
        return frame.astype({"sample_id": "str", "price": np.float64, "predicted": np.float64})
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
