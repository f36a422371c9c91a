"""Out-of-fold predictions of Fusion's own runs and ensembles: what each said of its own validation rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.quality.catalog import Catalog
from benchmarks.quality.predictions import Prediction
from fusion.compare.out_of_fold import Scored, find_run, scored, stacked
from fusion.data.tables import positions_of
from fusion.errors import DataError


def read_runs(runs: Sequence[str], output: str, catalog: Catalog) -> list[Prediction]:
    """One prediction per run, or for the fold runs of one recipe together.

    Args:
        runs: ids of runs in `output`, or URLs of their folders.

    Raises:
        DataError: a run without predictions, of other rows or prices, or two runs of one fold.
    """
    return [_prediction(one, catalog) for one in stacked([scored(find_run(output, run)) for run in runs])]


def _prediction(run: Scored, catalog: Catalog) -> Prediction:
    places, logs = positions_of(run.rows.index, catalog.ids), np.full(len(catalog.ids), np.nan)
    remedy = "name the data that the run was trained on with --data, and its --folds and --seed"
    if (places < 0).any():
        n_unknown = int((places < 0).sum())
        raise DataError(f"{n_unknown} of {len(places)} rows that {run.name} predicts are not in train.csv", remedy)
    n_other = int((run.rows["price"].to_numpy(np.float64) != catalog.prices[places]).sum())
    if n_other:
        raise DataError(f"{run.name} was trained with other prices for {n_other} of {len(places)} rows", remedy)
    logs[places] = np.log(run.rows["predicted"].to_numpy(np.float64))
    return Prediction(run.name, "Fusion", logs, is_ours=True)
