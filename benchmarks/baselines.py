"""Compares a run with the median price and ridge regression on the run's own split, also without near-copies.

    python benchmarks/baselines.py OUTPUT/runs/RUN_ID [--data URL]

Ridge regression predicts the log price from all sources, standardised and concatenated; its regularisation is chosen by
cross-validation on the training rows. The scores are also printed for the validation rows whose text vector is not too
close (by cosine) to that of a training row. Listings that differ in size or colour are not exact duplicates, so they
may be on both sides of a split unless --group-column names what they have in common.
"""

from __future__ import annotations

import argparse
import io
import json

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from fusion import storage
from fusion.data.embeddings import load
from fusion.data.tables import read_table
from fusion.distributed.world import join_world
from fusion.metrics import bootstrap_interval, row_smape

CLOSE = (0.8, 0.9, 0.95)  # cosines to the nearest training row; rows above each are left out in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="URL of an evaluated run")
    parser.add_argument("--data", help="folder or bucket of the input (default: the run's)")
    options = parser.parse_args()
    config = json.loads(storage.read(storage.join(options.run, "config.json")))
    data = options.data or config["data"]
    table = read_table(data, "train", priced=True, drop_bad_prices=True)
    with join_world("cpu") as world:
        store = load(data, "train", config["sources"], table.ids, world)
    split = _parquet(options.run, "split.parquet").set_index("sample_id").loc[table.ids]
    ours = _parquet(options.run, "metrics/predictions.parquet").set_index("sample_id")
    training, validation = (split["side"] == side for side in ("train", "validation"))
    inputs = np.hstack([values.float().numpy() for values in store.values.values()])
    guesses = {
        "median price": np.full(int(validation.sum()), np.median(table.prices[training])),
        "ridge": _ridge(inputs[training], table.prices[training], inputs[validation]),
        "this run": ours.loc[table.ids[validation], "predicted"].to_numpy(),
    }
    role = next((role for role in config["sources"] if "text" in role), next(iter(config["sources"])))
    vectors = normalize(store.values[role].float().numpy())
    nearest = (vectors[validation] @ vectors[training].T).max(1)
    _print(table.prices[validation], guesses, nearest, role)


def _ridge(inputs: np.ndarray, prices: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 6, 11)))
    return np.asarray(np.exp(model.fit(inputs, np.log(prices)).predict(wanted)))


def _print(prices: np.ndarray, guesses: dict[str, np.ndarray], nearest: np.ndarray, role: str) -> None:
    parts = {"all validation rows": nearest <= 2}  # always true: a cosine is at most 1
    parts |= {f"nearest training {role} below {cosine}": nearest < cosine for cosine in reversed(CLOSE)}
    for name, rows in parts.items():
        print(f"{name}: {rows.sum()} rows")
        for guess, predicted in guesses.items():
            errors = row_smape(prices[rows], predicted[rows])
            low, high = bootstrap_interval(errors)
            print(f"  {guess:14s} SMAPE {errors.mean():.2f} ({low:.2f} - {high:.2f})")


def _parquet(run: str, name: str) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO(storage.read(storage.join(run, name))))


if __name__ == "__main__":
    main()
