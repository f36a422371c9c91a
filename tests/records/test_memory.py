"""`memory.safetensors` holds the same rows and numbers after reading as before writing; damage is detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fusion import storage
from fusion.errors import DataError
from fusion.nn.neighbours import Memory, bands_of
from fusion.records import memory
from fusion.records.memory import Remembered, from_bytes, log_prices_of, read, to_bytes
from fusion.records.run import RunFolder

N_ROWS = 7


def remembered() -> Remembered:
    generator = torch.Generator().manual_seed(0)
    dims = {"image": 12, "text": 3}
    squares = {role: torch.randn(20, dim, generator=generator).numpy() for role, dim in dims.items()}
    keys = torch.randn(N_ROWS, 15, generator=generator).half()
    prices = np.array([1e-6, 0.5, 3.0, 19.99, 20.0, 500.0, 1e6])
    folds, groups = torch.arange(N_ROWS) % 3 - 1, torch.arange(N_ROWS) // 2
    ids = pd.Index([f"ä{row}" for row in range(N_ROWS)], dtype="str")
    kept = Memory(keys, log_prices_of(prices), folds, groups, bands_of(dims))
    weights = np.linspace(1, 2, int(kept.bands.max()) + 1, dtype=np.float32)
    return Remembered(ids, prices, kept, squares, weights)


def is_same(one: Remembered, two: Remembered) -> bool:
    tensors = ("keys", "log_prices", "folds", "groups", "bands")
    same = [torch.equal(getattr(one.memory, name), getattr(two.memory, name)) for name in tensors]
    same += [list(one.ids) == list(two.ids), np.array_equal(one.prices, two.prices)]
    same += [np.array_equal(one.weights, two.weights), list(one.components) == list(two.components)]
    return all(same) and all(np.array_equal(one.components[role], two.components[role]) for role in one.components)


def test_round_trip() -> None:
    made = remembered()
    assert is_same(from_bytes(to_bytes(made), "memory"), made)
    assert to_bytes(made) == to_bytes(made) == to_bytes(from_bytes(to_bytes(made), "memory"))


def test_components_may_have_any_memory_layout() -> None:
    """Eigenvectors come column by column; a run that went on had others than the one that began."""
    made = remembered()
    turned = Remembered(
        made.ids,
        made.prices,
        made.memory,
        {role: np.asfortranarray(values) for role, values in made.components.items()},
        made.weights,
    )
    assert is_same(from_bytes(to_bytes(turned), "memory"), made)
    assert to_bytes(turned) == to_bytes(made)


@pytest.mark.parametrize("damage", ["cut", "empty", "no rows", "nan", "weights", "ids"])
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    made, content = remembered(), to_bytes(remembered())
    if damage == "nan":
        made.memory.keys[2, 1] = float("nan")
    changed = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "no rows": to_bytes(Remembered(made.ids, made.prices[1:], made.memory, made.components, made.weights)),
        "nan": to_bytes(made),
        "weights": to_bytes(Remembered(made.ids, made.prices, made.memory, made.components, made.weights[1:])),
        "ids": to_bytes(Remembered(made.ids[1:], made.prices, made.memory, made.components, made.weights)),
    }[damage]
    storage.write(str(tmp_path / "memory.safetensors"), changed)
    with pytest.raises(DataError, match=r"memory\.safetensors is damaged: ") as caught:
        read(RunFolder(str(tmp_path)))
    assert "--run-id" in caught.value.remedy and "fusion.verify" in caught.value.remedy


def test_a_memory_of_another_training_is_refused(tmp_path: Path) -> None:
    content = to_bytes(remembered())
    storage.write(str(tmp_path / "memory.safetensors"), content)
    assert is_same(read(RunFolder(str(tmp_path)), storage.sha256(content)), remembered())
    with pytest.raises(DataError, match="is not the one that the run was trained with"):
        read(RunFolder(str(tmp_path)), "0" * 64)
    with pytest.raises(DataError, match="does not exist"):
        memory.read(RunFolder(str(tmp_path / "other")))
