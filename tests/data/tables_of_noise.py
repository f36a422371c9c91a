"""Tables and vectors without any order, for tests of splits and near-duplicates."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fusion.data.tables import Table


def make(n: int = 1000, **columns: object) -> Table:
    rng = np.random.default_rng(0)
    ids = pd.Index(sorted(str(i) for i in range(n)), name="sample_id")
    frame = pd.DataFrame({"price": rng.lognormal(3, 1, n), "catalog_content": [f"text {i}" for i in ids]}, index=ids)
    return Table(frame.assign(**columns), np.arange(n))


def noise(n: int = 1000, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 4)).astype(np.float32)
