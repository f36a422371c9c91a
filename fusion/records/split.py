"""Reads and writes `split.parquet` of a run: which rows train and which validate, as `fusion.data.splits` decided."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from fusion import storage
from fusion.errors import DataError
from fusion.records.manifests import SPLIT
from fusion.records.run import RunFolder


def read_split(run: RunFolder, sha256: str = "") -> pd.DataFrame:
    """Reads the split: one row per product, with the columns sample_id (str), side, group and perhaps fold.

    side is "train", "validation" or "dropped"; group numbers the groups of near-duplicates. fold exists if the run
    trained all folds, so that every row validates.

    Args:
        sha256: of the file that the run was trained with, from the manifest of a checkpoint; empty if unknown.

    Raises:
        DataError: the file does not exist, is damaged, or is not the one that the run was trained with.
    """
    content = run.read_as_trained(SPLIT, sha256)
    try:
        split = pd.read_parquet(io.BytesIO(content)).astype({"sample_id": "str"})
        return split[["sample_id", "side", "group", *(["fold"] if "fold" in split else [])]]
    except (ValueError, OSError, KeyError) as error:  # pyarrow's errors are subclasses of these
        cause = str(error).splitlines()[0]
        remedy = "restore it, or train under another --run-id"
        raise DataError(f"{run.at(SPLIT)} is damaged: {cause}", remedy) from error


def validation_groups(run: RunFolder, sha256: str = "") -> np.ndarray | None:
    """[n] the group of near-duplicates of each validation row; None for a copy of a run without its split.

    Args, Raises:
        As for `read_split`.
    """
    if not storage.exists(run.at(SPLIT)):
        return None
    split = read_split(run, sha256)
    return split.loc[split["side"] == "validation", "group"].to_numpy()


def to_parquet(split: pd.DataFrame) -> bytes:
    """The split as Parquet; the same rows always give the same bytes."""
    buffer = io.BytesIO()
    split.to_parquet(buffer, index=False)
    return buffer.getvalue()
