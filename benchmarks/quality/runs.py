"""Out-of-fold predictions of Fusion's runs and ensembles, which are those of their validation rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.quality.catalog import Catalog
from benchmarks.quality.predictions import Prediction
from fusion.compare.out_of_fold import Scored, find_run, scored, stacked
from fusion.data.tables import positions_of
from fusion.errors import DataError


def read_runs(runs: Sequence[str], output: str, catalog: Catalog) -> list[Prediction]:
    """Reads one prediction per run; runs of single folds with the same recipe are joined into one.

    Args:
        runs: ids of runs in `output`, or URLs of their folders.

    Raises:
        DataError: a run has no predictions, or other rows or prices, or there are two runs of the same fold.
    """
    return [_prediction(one, catalog) for one in stacked([scored(find_run(output, run)) for run in runs])]


def _prediction(run: Scored, catalog: Catalog) -> Prediction:
    positions, logs = positions_of(run.rows.index, catalog.ids), np.full(len(catalog.ids), np.nan)
    remedy = "name the data that the run was trained on with --data, and its --folds and --seed"
    if (positions < 0).any():
        n_unknown = int((positions < 0).sum())
        raise DataError(f"{n_unknown} of {len(positions)} rows that {run.name} predicts are not in train.csv", remedy)
    n_other = int((run.rows["price"].to_numpy(np.float64) != catalog.prices[positions]).sum())
    if n_other:
        raise DataError(f"{run.name} was trained with other prices for {n_other} of {len(positions)} rows", remedy)
    logs[positions] = np.log(run.rows["predicted"].to_numpy(np.float64))
    return Prediction(run.name, "Fusion", logs, is_ours=True)
