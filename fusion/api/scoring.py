"""`score`: the metrics of predictions against true prices, with intervals, of all rows and by columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fusion.api.frames import ID, table_from
from fusion.data.tables import Table, positions_of
from fusion.errors import DataError, did_you_mean
from fusion.evaluation.groups import grouped
from fusion.records.intervals import LEVELS

BINS = ("price_bin", "price_range")  # what rows can be grouped by without a column
BOUNDS = [f"{side}_{level}" for level in LEVELS for side in ("low", "high")]


def score(truth: Any, predicted: Any, by: str | Sequence[str] = ()) -> pd.DataFrame:
    """Scores predicted prices.

    >>> score([10.0, 20.0], [10.0, 25.0])[["group", "count", "smape", "mae"]].round(2).to_dict("records")
    [{'group': 'all rows', 'count': 2, 'smape': 11.11, 'mae': 2.5}]
    >>> fusion.score(frame, model.predict(frame, sources), by="category")  # doctest: +SKIP

    Args:
        truth: N true prices in dollars: a frame with the columns sample_id and price, or an array [N].
        predicted: a frame as of `Model.predict` or a `predictions.parquet`, with a row for each of truth, in any
            order; or an array [N] in the order of truth.
        by: columns of truth to group by, "price_bin" (ten ranges of the true price) or "price_range" (five).

    Returns:
        One row per group, the first of all rows: by, group, count, share; smape in percent, with its 95% interval
        smape_low to smape_high, for which rows are independent; mae, rmse, median_error, bias, mean_true and mean_pred
        in dollars; mape in percent; r2; and for predictions with bounds covered_80, covered_90 and covered_95, the
        share of true prices within.

    Raises:
        DataError: a price is not a number above 0, a row of truth was not predicted, or a column is missing.
    """
    names = [by] if isinstance(by, str) else list(by)
    known = _table(truth, "truth", [name for name in names if name not in BINS])
    rows = _aligned(known, predicted)
    columns = [name for name in names if name not in BINS]
    missing = [name for name in columns if name not in known.frame]
    if missing:
        near = did_you_mean(missing[0], [*known.columns, *BINS])
        raise DataError(f"truth has no column {missing[0]!r}; it has {list(known.columns)}", f"{near}correct by")
    found = grouped(rows, known.frame[columns])
    return found[found["by"].isin(["overall", *names])].reset_index(drop=True)


def _table(prices: Any, name: str, columns: list[str]) -> Table:
    """Prices with ids, from a frame, or from an array [N] whose rows are numbered."""
    if hasattr(prices, "columns") or hasattr(prices, "column_names"):
        return table_from(prices, priced=True, columns=columns, name=name)
    values = prices.detach().cpu().numpy() if hasattr(prices, "detach") else np.asarray(prices)
    if values.ndim != 1:
        raise DataError(f"{name} has shape {list(values.shape)}, expected [rows]", "give one price per row, or a frame")
    return table_from(pd.DataFrame({ID: np.arange(len(values)), "price": values}), priced=True, columns=[], name=name)


def _aligned(known: Table, predicted: Any) -> pd.DataFrame:
    """The rows of truth with sample_id, price, predicted and bounds, sorted by sample_id."""
    is_frame = hasattr(predicted, "columns") or hasattr(predicted, "column_names")
    if not is_frame:
        predicted = _as_frame(known, predicted)
    found = _table(predicted, "predicted", BOUNDS)
    positions = positions_of(known.ids, found.ids)
    missing = known.ids[positions < 0]
    if len(missing):
        raise DataError(
            f"predicted lacks {len(missing)} of the {len(known)} rows of truth, the first: {', '.join(missing[:5])}",
            "predict all rows, or leave out the others of truth",
        )
    rows = found.frame.iloc[positions].rename(columns={"price": "predicted"})
    return rows.reset_index().assign(price=known.prices)


def _as_frame(known: Table, predicted: Any) -> pd.DataFrame:
    """Prices [N] in the order of the rows of truth, with their ids."""
    values = predicted.detach().cpu().numpy() if hasattr(predicted, "detach") else np.asarray(predicted)
    if values.shape != (len(known),):
        message = f"predicted has shape {list(values.shape)}, expected [{len(known)}], one price per row of truth"
        raise DataError(message, "give one price per row, or a frame with sample_id and price")
    return pd.DataFrame({ID: known.ids[known.file_order], "price": values})
