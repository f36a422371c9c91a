"""Compares a run with the median price and ridge regression on its validation rows without near-copies.

    python benchmarks/baselines.py OUTPUT/runs/RUN_ID [--data URL]

The scores on all validation rows are in the run's `baselines.json`, and every evaluation prints them. Here, they are
also printed for the validation rows whose text vector is not too close (by cosine) to that of a training row. Listings
that differ in size or colour are not exact duplicates, so they may be on both sides of a split unless --group-column
names what they have in common. Ridge regression gets whole vectors here, and principal components in a training.
"""

from __future__ import annotations

import argparse
import io
import json

import numpy as np
import pandas as pd
import torch
from sklearn.preprocessing import StandardScaler, normalize

from fusion import storage
from fusion.data.embeddings import load
from fusion.data.tables import read_table
from fusion.distributed.world import join_world
from fusion.metrics import bootstrap_interval, row_smape
from fusion.training import ridge

CHUNK = 4096  # rows whose products are summed in float32
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
    parts = split["group"].to_numpy(np.int64)[training] % 8 == 0  # left out to choose the strength of the penalty
    guesses = {
        "median price": np.full(int(validation.sum()), np.median(table.prices[training])),
        "ridge": _ridge(inputs[training], table.prices[training], parts, inputs[validation]),
        "this run": ours.loc[table.ids[validation], "predicted"].to_numpy(),
    }
    role = next((role for role in config["sources"] if "text" in role), next(iter(config["sources"])))
    vectors = normalize(store.values[role].float().numpy())
    nearest = (vectors[validation] @ vectors[training].T).max(1)
    _print(table.prices[validation], guesses, nearest, role)


def _ridge(inputs: np.ndarray, prices: np.ndarray, parts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    scaler = StandardScaler().fit(inputs)
    columns = [scaler.transform(inputs).astype(np.float32), np.log(prices), parts.astype(np.int64)]
    blocks = zip(*(torch.split(torch.from_numpy(column), CHUNK) for column in columns), strict=True)
    model = ridge.fit(*ridge.sums_of(blocks, inputs.shape[1], 2))
    return np.exp(model.predict(torch.from_numpy(scaler.transform(wanted).astype(np.float32))).numpy())


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
