"""What is said about rows that a source has wrong, too few or too many of."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from fusion import log
from fusion.data.source_rows import too_few
from fusion.errors import DataError
from fusion.prepare.shards import Findings

N_SHOWN = 3  # ids in a message


def check(source: str, found: Findings, n_rows: int, max_missing: float, drop_bad_vectors: bool) -> None:
    """Warns of rows that are left out, and refuses a source that training could not use.

    Args:
        n_rows: number of rows of the table.
        max_missing: largest share of them that the source may lack.
        drop_bad_vectors: whether a vector with values that are not finite is left out, instead of being an error.

    Raises:
        DataError: an id has several vectors, a vector is not finite, or too many rows have no vector.
    """
    if len(found.contradictory):
        ids = found.contradictory.unique()
        message = f"{len(ids)} ids of {source} occur with different vectors, the first: {_shown(ids)}"
        raise DataError(message, "keep one vector for each id")
    if len(found.not_finite) and not drop_bad_vectors:
        message = f"{len(found.not_finite)} vectors of {source} have NaN or infinite values, the first: "
        raise DataError(message + _shown(found.not_finite), "correct them, or leave them out with --drop-bad-vectors")
    _warn("ids_not_in_table", source, found.unknown, "left out")
    _warn("not_finite", source, found.not_finite, "left out")
    _warn("vectors_of_zeros", source, found.zeros, "left out, as training counts them as missing")
    _warn("repeated_rows", source, found.repeated, "kept once, as their vectors are equal")
    if len(found.missing) > max_missing * n_rows:
        missing, unknown = (pa.array(ids.sort(), pa.large_string()) for ids in (found.missing, found.unknown))
        raise too_few(f"source {source!r}", n_rows - len(missing), missing, unknown, max_missing)


def _warn(event: str, source: str, ids: pl.Series, treated: str) -> None:
    if len(ids):
        log.warning(event=event, source=source, rows=len(ids), first=_shown(ids), treated=treated)


def _shown(ids: pl.Series) -> str:
    return ", ".join(ids.sort().head(N_SHOWN))
