"""Says what the prices of a prediction are like: their quartiles beside those of the training, and a few rows."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pandas as pd

from fusion import log
from fusion.errors import FusionError
from fusion.metrics import readable
from fusion.records.manifests import PREDICTIONS, Folder
from fusion.records.run import RunFolder
from fusion.submissions.submission import open_submission
from fusion.terminal import tables

QUARTILES = (0.25, 0.5, 0.75)
N_EXAMPLES = 5
MOST_READ = 32 << 20  # bytes of a submission that was published before, so that showing it takes at most seconds
LEVEL = 90  # percentage of true prices within the interval that is shown


def log_quartiles(prices: np.ndarray, trained: Sequence[float] | None) -> None:
    """Logs the quartiles of predicted prices [n] and, if known, of the training prices; a terminal gets a table."""
    found = dict(zip(("low_quartile", "median", "high_quartile"), np.quantile(prices, QUARTILES).tolist(), strict=True))
    known = dict(zip(("training_low", "training_median", "training_high"), trained or (), strict=False))
    tell = log.store if is_shown() else log.info
    tell(event="prices", **found, **known)


def show(rows: pd.DataFrame, prices: np.ndarray, trained: Sequence[float] | None, url: str) -> None:
    """Prints on a terminal what the prices are like, and where they are.

    Args:
        rows: the first rows of the table: sample_id, price, and perhaps low_90 and high_90.
        prices: [n] predicted prices of all rows.
        trained: quartiles of the training prices; None if they are not known.
        url: of `submission.csv`.
    """
    console = tables.console()
    headings = ("25%", "median", "75%")
    quartiles = tables.table("Prices in $", "", *headings, numbers=headings)
    tables.add(quartiles, "predicted", *map(readable, np.quantile(prices, QUARTILES).tolist()))
    if trained is not None:
        tables.add(quartiles, "training", *map(readable, trained))
    console.print(quartiles)
    console.print(_examples(rows))
    console.print(tables.text(f"{len(prices):,} rows are in {url}"), soft_wrap=True)
    console.print(tables.text(f"{PREDICTIONS} beside it has their intervals and comparable products"))


def show_published(url: str) -> None:
    """Prints on a terminal what the prices of a submission are like that was published before, if that is quick.

    Args:
        url: of `submission.csv`.
    """
    if is_shown():
        with suppress(FusionError):  # it is published; that it cannot be read again does not matter
            _show_published(url)


def _show_published(url: str) -> None:
    found = open_submission(Folder(url.rpartition("/")[0]))
    n_bytes = sum(entry.bytes for entry in found.manifest.files if entry.key == PREDICTIONS) if found else 0
    content = found.read_whole(PREDICTIONS) if found and 0 < n_bytes < MOST_READ else None
    if found is None or content is None:
        return
    columns = ["sample_id", "price", f"low_{LEVEL}", f"high_{LEVEL}"]
    rows = pd.read_parquet(io.BytesIO(content))
    facts = RunFolder(found.manifest.run).facts_if_whole()
    trained = facts.price_quartiles if facts else None
    show(rows.filter(items=columns).head(N_EXAMPLES), rows["price"].to_numpy(), trained, url)


def _examples(rows: pd.DataFrame) -> tables.Table:
    has_bounds = f"low_{LEVEL}" in rows
    headings = ["price", *([f"{LEVEL}% interval"] if has_bounds else [])]
    made = tables.table(f"The first {len(rows)} rows", "sample_id", *headings, numbers=headings)
    for row in rows.to_dict("records"):
        bounds = [f"{readable(row[f'low_{LEVEL}'])} - {readable(row[f'high_{LEVEL}'])}"] if has_bounds else []
        tables.add(made, str(row["sample_id"]), readable(row["price"]), *bounds)
    return made


def is_shown() -> bool:
    """Whether there is a terminal to show prices on."""
    return sys.stdout.isatty() and sys.stderr.isatty()
