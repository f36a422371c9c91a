"""Checks of `memory.safetensors`: the rows that neighbours are taken from are those of the split, with their prices."""

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

COMPONENTS = "components."
PARTITION = ("partition.centroids", "partition.lists", "partition.codebook")
COLUMNS_PER_CODE = 4  # a copy of the constant in `fusion.nn.approximate`: verify must not load torch
WANTED = ("ids", "prices", "keys", "folds", "groups", "weights")


def check_memory(report: Report, content: bytes, split: bytes | None, facts: RunFacts | None) -> None:
    """Checks what a model leans on; it is read without torch.

    Args:
        split: of the run; None: there is none.
        facts: None: unknown.
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
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: Mapping[str, np.ndarray] = load(content)
    except (SafetensorError, ValueError) as error:
        report.bad(MEMORY, "rows that neighbours are taken from", first_line(error))
        return None
    missing = [name for name in WANTED if name not in arrays]
    if missing:
        report.bad(MEMORY, f"arrays {', '.join(WANTED)}", f"no {' and no '.join(missing)}")
        return None
    return arrays


def _check_shapes(report: Report, arrays: Mapping[str, np.ndarray], facts: RunFacts | None) -> None:
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
    """Whether the lists that an approximate search looks through, if there are any, are lists of these rows."""
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
    """sample_id, price, group, side and perhaps fold; None: the split is damaged, which its own check says."""
    import pandas as pd
    from pyarrow import ArrowException

    try:
        return pd.read_parquet(io.BytesIO(split)).astype({"sample_id": "str"})
    except (ArrowException, ValueError, OSError, KeyError):
        return None


def _check_rows(report: Report, arrays: Mapping[str, np.ndarray], rows: pd.DataFrame) -> None:
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
        report.bad(f"{MEMORY}: {', '.join(other)}", "those of split.parquet", "others")
    else:
        report.ok(f"{MEMORY}: {len(rows)} rows, those of split.parquet, {int((arrays['folds'] < 0).sum())} unused")


def _are_folds_of(folds: np.ndarray, rows: pd.DataFrame) -> bool:
    """Whether each row is in its part, or in none, as one without embeddings is; sides are two parts."""
    used = folds >= 0
    if "fold" in rows:
        return bool((folds == rows["fold"])[used].all())
    parts = [set(folds[used & (rows["side"] == side)]) for side in ("train", "validation", "dropped")]
    return len(parts[0]) <= 1 and len(parts[1]) <= 1 and not parts[0] & parts[1] and not parts[2]
