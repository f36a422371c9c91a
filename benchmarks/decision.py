"""Would shifted predictions have a lower SMAPE? `python benchmarks/decision.py RUN [--output OUTPUT]`.

Takes the out-of-fold predictions of a finished run with `--folds`, and shifts their log prices to minimise the expected
SMAPE, given the smoothed distribution of log errors. The shift is the same for all rows, or depends on the tier of the
price, or on the tier and the spread of the neighbours' prices. It is estimated from rows of other folds than the row
and its near-duplicates. Prints the SMAPE of each rule and its difference to the unshifted predictions, with a standard
error that is clustered by groups of near-duplicates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd

from fusion.compare.out_of_fold import find_run, scored
from fusion.compare.standard_errors import clustered_mean
from fusion.metrics import row_smape

FOLDS = 10  # of the cross-fitting of shifts
MOVES = np.linspace(-0.5, 0.5, 201)  # candidate shifts of log prices
# Standard deviation of the noise that smooths the distribution of log errors. Without it, the best shift would be drawn
# to errors that occur often exactly, such as 0 if all neighbours have the row's price.
SMOOTHING = 0.05
N_TIERS, N_SPREADS = 5, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--output", default="output")
    options = parser.parse_args()
    rows = scored(find_run(options.output, options.run)).rows
    as_is = row_smape(rows["price"].to_numpy(), rows["predicted"].to_numpy())
    print(f"as it is                          {as_is.mean():.3f}")
    tiers = pd.qcut(rows["predicted"], N_TIERS, labels=False)
    bins = {"all alike": tiers * 0, f"by {N_TIERS} tiers": tiers}
    if "spread" in rows:
        bins["by tier and spread"] = tiers * N_SPREADS + pd.qcut(rows["spread"], N_SPREADS, labels=False)
    for kind, move in {"least expected SMAPE": _least_smape, "median": _median, "mean of dollars": _mean}.items():
        for name, places in bins.items():
            moved = rows["predicted"].to_numpy() * np.exp(_moves(rows, places.to_numpy(), move))
            errors = row_smape(rows["price"].to_numpy(), moved)
            found = clustered_mean(errors - as_is, rows["group"].to_numpy())
            print(f"{kind:20} {name:18} {errors.mean():.3f}  {found.mean:+.3f} ({found.error:.3f})")


def _moves(rows: pd.DataFrame, bins: np.ndarray, move: Callable[[np.ndarray], float]) -> np.ndarray:
    """[n] shifts of log prices, each estimated from the errors of the rows in the same bin and in other folds."""
    errors = np.log(rows["price"].to_numpy()) - np.log(rows["predicted"].to_numpy())
    groups = rows["group"].to_numpy()
    fold = np.random.default_rng(0).integers(FOLDS, size=groups.max() + 1)[groups]
    moves = np.zeros(len(rows))
    for number in range(FOLDS):
        for one in np.unique(bins):
            is_here = (fold == number) & (bins == one)
            if is_here.any():
                moves[is_here] = move(errors[(fold != number) & (bins == one)])
    return moves


def _least_smape(errors: np.ndarray) -> float:
    smooth = errors + np.random.default_rng(1).normal(0, SMOOTHING, (20, len(errors)))
    # SMAPE is proportional to tanh(|log error| / 2), see fusion.loss_functions.
    expected = [np.tanh(np.abs(smooth - one) / 2).mean() for one in MOVES]
    return float(MOVES[int(np.argmin(expected))])


def _median(errors: np.ndarray) -> float:
    return float(np.median(errors))


def _mean(errors: np.ndarray) -> float:
    return float(np.log(np.exp(errors).mean()))


if __name__ == "__main__":
    main()
