"""Checks of `memory.safetensors`: its rows and prices are those of the split, and its arrays fit each other.

The file is read with NumPy, so that the command does not have to import torch.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fusion.records.manifests import MEMORY
from fusion.records.schemas import RunFacts
from fusion.verify.findings import Report, first_line

if TYPE_CHECKING:
    import pandas as pd

COMPONENTS = "components."  # prefix of the arrays with principal components, one per role
PARTITION = ("partition.centroids", "partition.lists", "partition.codebook")
COLUMNS_PER_CODE = 4  # a copy of the constant in `fusion.nn.approximate`, which cannot be imported without torch
SIDES = ("train", "validation", "dropped")
WANTED = ("ids", "prices", "keys", "folds", "groups", "weights")


def check_memory(report: Report, content: bytes, split: bytes | None, facts: RunFacts | None) -> None:
    """Checks the memory of a run, whose sha256 is compared elsewhere.

    Args:
        content: of `memory.safetensors`.
        split: content of the run's `split.parquet`; None if it is missing or damaged.
        facts: `run.json` of the run; None if it is missing or damaged.
    """
    arrays = _parsed(report, content)
    if arrays is None:
        return
    _check_shapes(report, arrays, facts)
    _check_lists(report, arrays)
    rows = None if split is None else _rows(split)
    if rows is not None:
        _check_rows(report, arrays, rows)


def _parsed(report: Report, content: bytes) -> Mapping[str, np.ndarray] | None:
    """The arrays in the file; None, with a finding, if it is not safetensors or an array is missing."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: Mapping[str, np.ndarray] = load(content)
    except (SafetensorError, ValueError) as error:
        report.bad(MEMORY, "a safetensors file", first_line(error))
        return None
    missing = [name for name in WANTED if name not in arrays]
    if missing:
        report.bad(MEMORY, f"arrays {', '.join(WANTED)}", f"no {' and no '.join(missing)}")
        return None
    return arrays


def _check_shapes(report: Report, arrays: Mapping[str, np.ndarray], facts: RunFacts | None) -> None:
    """Compares the columns of keys and components with each other and with `run.json`."""
    components = {name.removeprefix(COMPONENTS): one for name, one in arrays.items() if name.startswith(COMPONENTS)}
    n_columns = sum(one.shape[1] for one in components.values())
    report.expect(f"{MEMORY}: columns of its keys", n_columns, arrays["keys"].shape[-1])
    if facts is not None:
        report.expect(
            f"{MEMORY}: dims of run.json", facts.dims, {role: components[role].shape[0] for role in facts.dims}
        )
    broken = [name for name, one in arrays.items() if one.dtype.kind == "f" and not np.isfinite(one).all()]
    if broken:
        report.bad(f"{MEMORY}: numbers", "finite", f"others in {', '.join(broken)}")


def _check_lists(report: Report, arrays: Mapping[str, np.ndarray]) -> None:
    """Checks that the lists of the approximate search, if the file has them, fit its rows."""
    there = [name for name in PARTITION if name in arrays]
    if not there:
        return
    if len(there) < len(PARTITION):
        report.bad(f"{MEMORY}: lists of its rows", ", ".join(PARTITION), f"only {' and '.join(there)}")
        return
    (centroids, lists, codebook), keys = (arrays[name] for name in PARTITION), arrays["keys"]
    report.expect(f"{MEMORY}: columns of the centroids", keys.shape[-1], centroids.shape[-1])
    report.expect(f"{MEMORY}: codes of a key", -(-keys.shape[-1] // COLUMNS_PER_CODE), len(codebook))
    report.expect(f"{MEMORY}: rows in lists", len(keys), len(lists))
    if not ((lists >= 0) & (lists < len(centroids))).all():
        report.bad(f"{MEMORY}: lists of its rows", f"numbers below {len(centroids)}, of centroids", "others")


def _rows(split: bytes) -> pd.DataFrame | None:
    """The rows of the split: sample_id, price, group, side and perhaps fold.

    Returns None if it is damaged, which is reported by the check of the split.
    """
    import pandas as pd
    from pyarrow import ArrowException

    try:
        return pd.read_parquet(io.BytesIO(split)).astype({"sample_id": "str"})
    except (ArrowException, ValueError, OSError, KeyError):
        return None


def _check_rows(report: Report, arrays: Mapping[str, np.ndarray], rows: pd.DataFrame) -> None:
    """Compares ids, prices, groups and folds with the split."""
    n_rows = {len(arrays[name]) for name in ("prices", "keys", "folds", "groups")}
    if n_rows != {len(rows)}:
        report.bad(f"{MEMORY}: rows", f"{len(rows)}, as in split.parquet", ", ".join(map(str, sorted(n_rows))))
        return
    same = {
        "ids": arrays["ids"].tobytes() == "\0".join(rows["sample_id"]).encode(),
        "prices": np.array_equal(arrays["prices"], rows["price"]),
        "groups": np.array_equal(arrays["groups"], rows["group"]),
        "folds": _are_folds_of(arrays["folds"], rows),
    }
    other = [name for name, is_same in same.items() if not is_same]
    if other:
        report.bad(f"{MEMORY}: {', '.join(other)}", "those of split.parquet", "other values")
    else:
        report.ok(f"{MEMORY}: {len(rows)} rows, those of split.parquet, {int((arrays['folds'] < 0).sum())} unused")


def _are_folds_of(folds: np.ndarray, rows: pd.DataFrame) -> bool:
    """Whether the folds in the memory are those of the split.

    A row without embeddings has fold -1 and is never a neighbour. If the split has no folds, the training rows are one
    fold, the validation rows another, and dropped rows have none.
    """
    used = folds >= 0
    if "fold" in rows:
        return bool((folds == rows["fold"])[used].all())
    train, validation, dropped = (set(folds[used & (rows["side"] == side)]) for side in SIDES)
    if len(train) > 1 or len(validation) > 1:
        return False
    return not train & validation and not dropped
