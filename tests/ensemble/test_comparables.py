"""Comparable products of an ensemble: those of its members, each listed once, with the sum of its weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from fusion.ensemble.comparables import N_MERGED, all_named, merged, positions_among
from tests.small_models import BEST, batch_for, build

WEIGHTS = (0.5, 0.3, 0.2)
NOTHING = torch.tensor([], dtype=torch.int64)


def said(rows: list[list[int]], weights: list[list[float]]) -> dict[str, Tensor]:
    return {"comparable_rows": torch.tensor(rows), "comparable_weights": torch.tensor(weights)}


def test_weights_of_one_product_are_added_up() -> None:
    one = said([[0, 1, 2], [2, 1, 0]], [[0.6, 0.3, 0.1], [0.9, 0.0, 0.0]])
    two = said([[1, 3, 0], [3, 2, 1]], [[0.5, 0.4, 0.1], [0.5, 0.5, 0.0]])
    positions = torch.tensor([10, 11, 12, 13])
    found = merged([one, two, {"price": torch.ones(2)}], WEIGHTS, [positions, positions, NOTHING])
    rows, weights = found["comparable_rows"], found["comparable_weights"]
    assert rows[0].tolist() == [10, 11, 13] and rows[1].tolist()[:2] == [12, 13]
    torch.testing.assert_close(weights, torch.tensor([[0.33, 0.30, 0.12], [0.60, 0.15, 0.0]]))


def test_members_may_have_other_rows_in_another_order() -> None:
    one, two = said([[0, 1]], [[0.7, 0.3]]), said([[0, 1]], [[0.9, 0.1]])
    found = merged([one, two], (0.5, 0.5), [torch.tensor([4, 5]), torch.tensor([5, 6])])
    assert found["comparable_rows"].tolist() == [[5, 4]]
    torch.testing.assert_close(found["comparable_weights"], torch.tensor([[0.6, 0.35]]))


def test_members_without_neighbours_give_nothing() -> None:
    assert merged([{"price": torch.ones(2)}], [1.0], [NOTHING]) == {}


def test_a_row_without_weights_lists_different_products() -> None:
    found = merged([said([[3, 1, 2]], [[0.0] * 3])] * 2, (0.5, 0.5), [torch.arange(9)] * 2)
    assert sorted(found["comparable_rows"][0].tolist()) == [1, 2, 3] and not found["comparable_weights"].any()


@pytest.mark.parametrize("n_rows", [1, 300])
def test_the_sums_equal_those_of_a_plain_loop(n_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts, positions = [], [torch.randperm(60, generator=generator) for _ in WEIGHTS]
    for _ in WEIGHTS:
        rows = torch.stack([torch.randperm(60, generator=generator)[:20] for _ in range(n_rows)])
        weights = torch.rand(n_rows, 20, generator=generator).sort(1, descending=True).values
        parts.append({"comparable_rows": rows, "comparable_weights": weights / weights.sum(1, keepdim=True)})
    found = merged(parts, WEIGHTS, positions)
    for row in range(n_rows):
        total: Counter[int] = Counter()
        for part, weight, known in zip(parts, WEIGHTS, positions, strict=True):
            products = known[part["comparable_rows"][row]]
            for position, share in zip(products, part["comparable_weights"][row], strict=True):
                total[int(position)] += weight * float(share)
        heaviest = total.most_common(5)
        assert found["comparable_rows"][row].tolist() == [position for position, _ in heaviest]
        np.testing.assert_allclose(found["comparable_weights"][row], [share for _, share in heaviest], rtol=1e-5)


def test_the_known_products_are_those_of_all_members() -> None:
    models = [build("pair", "concat", **BEST), build("pair", "concat", **BEST)]
    models.append(build("pair", "concat", recipe="published"))
    prices = pd.Series(np.arange(1.0, 41.0), [f"p{row}" for row in range(40)])
    models[0].named_rows, models[1].named_rows = prices, prices.iloc[::-1].rename({"p0": "new"})
    known = all_named(models)
    assert len(known) == 41 and known["p7"] == 8 and known["new"] == 1
    positions = positions_among(known, models, torch.device("cpu"))
    assert known.index[int(positions[1][0])] == "p39" and known.index[int(positions[1][-1])] == "new"
    assert len(positions[2]) == 0
    found = models[0].eval().explained(batch_for(models[0]))
    assert found["comparable_rows"].shape[1] == min(N_MERGED, 7), "more than a run alone lists"
    assert all_named(models[2:]).empty
