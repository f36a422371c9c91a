"""`split.parquet` of a run: which of its rows trained and which validate, as `fusion.data.splits` decided."""

from __future__ import annotations

import io

import pandas as pd

from fusion import storage
from fusion.errors import DataError
from fusion.records.manifests import SPLIT
from fusion.records.run import RunFolder


def read_split(run: RunFolder, sha256: str = "") -> pd.DataFrame:
    """sample_id (str), side, group and, with folds that all validate, fold of every row, as `to_parquet` wrote them.

    Args:
        sha256: of the bytes that the run was trained with; unknown if empty.

    Raises:
        DataError: there is none, or it is damaged.
    """
    url = run.at(SPLIT)
    content = storage.read(url)
    remedy = "restore it, or train under another --run-id"
    if sha256 not in ("", storage.sha256(content)):
        raise DataError(f"{url} is not the one that the run was trained with", remedy)
    try:
        split = pd.read_parquet(io.BytesIO(content)).astype({"sample_id": "str"})
        return split[["sample_id", "side", "group", *(["fold"] if "fold" in split else [])]]
    except (ValueError, OSError, KeyError) as error:  # pyarrow's errors are among them
        raise DataError(f"{url} is damaged: {str(error).splitlines()[0]}", remedy) from error


def to_parquet(split: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    split.to_parquet(buffer, index=False)
    return buffer.getvalue()
