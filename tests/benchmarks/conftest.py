"""A small catalog for the benchmarks of quality and of time to quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 products; their vectors tell the price, and every fifth has a near-duplicate."""
    folder = tmp_path_factory.mktemp("quality")
    (folder / "embeddings" / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal((200, dim)).astype(np.float32) for name, dim in (("images", 6), ("texts", 5))}
    twins = np.arange(0, 200, 5)
    vectors["images"][twins + 1] = vectors["images"][twins]
    logs = 3 + vectors["images"][:, 0] + 0.5 * vectors["texts"][:, 0] + 0.1 * rng.standard_normal(200)
    ids = np.array([f"p{number:03}" for number in rng.permutation(200)])
    texts = [f"Item Name: thing {number}\nBrand: brand {int(log)}" for number, log in enumerate(logs)]
    frame = pd.DataFrame({"sample_id": ids, "price": np.exp(logs), "catalog_content": texts})
    frame.to_csv(folder / "train.csv", index=False)
    for name, values in vectors.items():
        pd.DataFrame({"sample_id": ids, "embedding": list(values)}).to_parquet(
            folder / "embeddings" / "train" / f"{name}.parquet"
        )
    return folder
