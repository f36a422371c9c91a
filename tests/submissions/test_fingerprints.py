"""Fingerprints distinguish rounding from other vectors, and agreement detects wrong ids on the first night."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from fusion.data.row_store import RowStore
from fusion.distributed.world import World
from fusion.nn.layers import ConcatNetwork
from fusion.nn.price_model import PriceModel
from fusion.submissions import fingerprints
from fusion.submissions.fingerprints import (
    Comparison,
    agreements,
    agreements_with_chance,
    compared,
    statistics_of,
    to_parquet,
)

DIMS = {"image": 40, "text": 24}
N = 400


class Alone(World):
    """A group of one that needs no process group."""

    def sum(self, values: list[float]) -> list[float]:  # type: ignore[override]
        return values

    def gather_on_main(self, value: np.ndarray) -> list[np.ndarray]:  # type: ignore[override]
        return [value]


WORLD = Alone(0, 1, 0, 1, torch.device("cpu"))
IDS = pd.Index([f"id{number}" for number in range(N)])


def rows(seed: int, n: int = N) -> dict[str, torch.Tensor]:
    """Two sources that tell of the same 8 properties of each product, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(0)
    properties = torch.randn(n, 8, generator=generator)
    return {
        role: 3 + properties @ torch.randn(8, dim, generator=mixing) + torch.randn(n, dim, generator=generator)
        for role, dim in DIMS.items()
    }


def store(values: dict[str, torch.Tensor]) -> RowStore:
    return RowStore(values, {role: torch.ones(len(one), dtype=torch.bool) for role, one in values.items()})


@pytest.fixture(scope="module")
def model() -> PriceModel:
    made = PriceModel([ConcatNetwork(DIMS, 4, (4,), 0.0)], DIMS)
    made.calibrate({role: (one.mean(0), one.std(0)) for role, one in rows(1, 2000).items()}, torch.randn(9))
    return made


def seen(model: PriceModel, values: dict[str, torch.Tensor]) -> fingerprints.EmbeddingStatistics:
    return statistics_of(model, store(values), IDS, WORLD)


def test_rounding_keeps_a_fingerprint_and_another_product_changes_it(model: PriceModel) -> None:
    exact, rounded = (seen(model, {k: v.to(kind) for k, v in rows(2).items()}) for kind in (torch.float32, torch.half))
    assert compared(exact.prints["image"], rounded.prints["image"]) == Comparison(N, 0, 0)
    other = seen(model, rows(3))
    assert compared(exact.prints["image"], other.prints["image"]).new > 0.98 * N


def test_vectors_of_other_products_count_as_moved(model: PriceModel) -> None:
    values = rows(2)
    before = seen(model, values).prints["text"]
    swapped = seen(model, values | {"text": values["text"][torch.arange(N).roll(1)]}).prints["text"]
    assert compared(before, swapped).moved > 0.98 * N


def test_placeholder_vectors_do_not_count_as_moved(model: PriceModel) -> None:
    values = rows(2)
    values["image"][:60] = values["image"][0]
    before = seen(model, values).prints["image"]
    values["image"][60:70] = values["image"][0]
    assert compared(before, seen(model, values).prints["image"]) == Comparison(N, 0, 10)


def test_missing_embeddings_have_no_fingerprint_and_are_not_counted(model: PriceModel) -> None:
    whole = store(rows(2))
    there = whole.present["text"].clone()
    there[:30] = False
    some = RowStore(whole.values, whole.present | {"text": there})
    found = statistics_of(model, some, IDS, WORLD)
    assert (found.prints["text"] == 0).sum() == 30 and (found.prints["image"] > 0).all()
    assert compared(found.prints["text"], seen(model, rows(2)).prints["text"]) == Comparison(N - 30, 0, 0)


def test_training_rows_have_shift_0_and_spread_1(model: PriceModel) -> None:
    found, halved = seen(model, rows(2)), seen(model, {role: one / 2 for role, one in rows(2).items()})
    for role in DIMS:
        assert found.spread[role] == pytest.approx(1, abs=0.15) and found.shift[role] < 0.2
        assert halved.spread[role] == pytest.approx(0.25, abs=0.05) and halved.shift[role] > 0.2


def test_agreement_vanishes_if_one_source_is_under_wrong_ids(model: PriceModel) -> None:
    values = rows(2)
    whole = agreements(seen(model, values).prints)["image text"]
    shuffled = values | {"image": values["image"][torch.randperm(N, generator=torch.Generator().manual_seed(5))]}
    measured, chance = agreements_with_chance(seen(model, shuffled).prints)["image text"]
    assert whole > 0.1 and measured < 0.1 * whole and chance < 0.1 * whole


def test_constant_sources_have_no_agreement(model: PriceModel) -> None:
    values = {role: one[:1].expand(N, -1).clone() for role, one in rows(2).items()}
    found = seen(model, values)
    assert agreements(found.prints) == {"image text": 0.0} and max(found.spread.values()) < 1e-3


def test_fingerprints_survive_a_round_trip_through_parquet(model: PriceModel, tmp_path: object) -> None:
    prints = seen(model, rows(2)).prints
    (path := tmp_path / "f.parquet").write_bytes(to_parquet(prints))  # type: ignore[operator]
    frame = pd.read_parquet(path).set_index("sample_id")
    assert (frame == prints).all().all() and (frame.dtypes == np.uint64).all()
