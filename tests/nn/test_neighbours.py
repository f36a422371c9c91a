"""Neighbours: the search is exact, excludes a row's group and held-out folds, and weights follow the formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.nn import neighbours
from fusion.nn.neighbours import Candidates, CandidateTable, Memory, Neighbours, band_weights, bands_of, largest

DIMS = {"image": 40, "text": 9}
WEIGHTS = torch.tensor([3.0, 1.0, 0.5, 2.0, 4.0])


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def is_rough(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the machine multiplies bfloat16: both kinds are tried on any."""
    monkeypatch.setattr(neighbours, "_has_bf16_tiles", lambda: request.param)
    return bool(request.param)


def keys(n_rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = [F.normalize(torch.randn(n_rows, dim, generator=generator), dim=1) for dim in DIMS.values()]
    return torch.cat(parts, dim=1).half()


def memory(n_rows: int) -> Memory:
    log_prices = torch.linspace(-2, 7, n_rows)
    return Memory(keys(n_rows), log_prices, torch.arange(n_rows) % 3, torch.arange(n_rows) // 2, bands_of(DIMS))


def totals(queries: Tensor, kept: Memory) -> Tensor:
    """[B, N] weighted similarities in float64, column by column."""
    weighted = queries.double() * WEIGHTS.double()[kept.bands]
    return (weighted.unsqueeze(1) * kept.keys.double().unsqueeze(0)).sum(2)


@pytest.mark.parametrize(("n_rows", "k"), [(1, 1), (5, 9), (300, 7), (1000, 3), (1000, 128), (4099, 16)])
def test_a_search_finds_the_most_similar_rows(n_rows: int, k: int, is_rough: bool) -> None:
    kept, queries = memory(n_rows), keys(33, seed=1)
    found, expected = kept.search(queries, WEIGHTS, k), totals(queries, kept)
    assert found.rows.shape == (33, min(k, n_rows)) and found.usable.all()
    assert [len(set(row)) for row in found.rows.tolist()] == [min(k, n_rows)] * 33
    reached = expected.gather(1, found.rows).min(1).values
    bound = expected.topk(min(k, n_rows)).values[:, -1]
    assert (reached >= bound - (0.1 if is_rough else 1e-5)).all()
    assert torch.equal(found.log_prices, kept.log_prices[found.rows])
    assert torch.equal(found.folds, kept.folds[found.rows])


def test_similarities_are_the_parts_of_the_bands() -> None:
    kept, queries = memory(200), keys(70, seed=1)
    found = kept.search(queries, WEIGHTS, 5)
    by_hand = torch.zeros(70, 5, len(WEIGHTS))
    for band in range(len(WEIGHTS)):
        columns = kept.bands == band
        products = queries[:, columns].float().unsqueeze(1) * kept.keys[found.rows][:, :, columns].float()
        by_hand[:, :, band] = products.sum(2)
    torch.testing.assert_close(found.similarities, by_hand, atol=1e-3, rtol=1e-3)
    assert kept.similarities(queries[:0], found.rows[:0]).shape == (0, 5, len(WEIGHTS))


@pytest.mark.parametrize("n_columns", [1, 63, 64, 65, 640, 641, 64 * 40 + 17])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_largest_is_topk_at_any_size(n_columns: int, k: int) -> None:
    values = torch.randn(12, n_columns, generator=torch.Generator().manual_seed(n_columns))
    values[:, -1] = 99.0  # in the columns after the last complete part
    values[3] = -torch.inf
    k = min(k, n_columns)
    found, places = largest(values, k)
    assert torch.equal(found, values.topk(k).values)
    assert torch.equal(values.gather(1, places), found)


def test_largest_finds_each_of_equal_values_once() -> None:
    found, places = largest(torch.ones(4, 64 * 50 + 3), 10)
    assert (found == 1).all() and [len(set(row)) for row in places.tolist()] == [10] * 4


def test_no_row_of_the_own_group_is_a_candidate(is_rough: bool) -> None:
    kept = memory(101)
    found = kept.search(kept.keys, WEIGHTS, 101, kept.groups)
    assert not (kept.groups[found.rows] == kept.groups.unsqueeze(1))[found.usable].any()
    assert found.usable.sum(1).tolist() == [101 - int((kept.groups == group).sum()) for group in kept.groups]


def test_all_rows_in_one_group_have_no_candidates() -> None:
    kept = replace(memory(20), groups=torch.zeros(20, dtype=torch.int64))
    assert not kept.search(kept.keys, WEIGHTS, 5, kept.groups).usable.any()


def test_rows_in_no_part_of_the_split_are_never_candidates(is_rough: bool) -> None:
    kept = memory(60)
    kept.folds[::4] = -1
    found = kept.search(kept.keys, WEIGHTS, 60)
    assert (found.folds[found.usable] >= 0).all() and found.usable.sum(1).eq(45).all()


@pytest.mark.parametrize(("held_out", "left"), [((1,), {0, 2}), ((0, 0), {1, 2}), ((0, 1, 2), {0, 1, 2})])
def test_parts_that_all_members_hold_out_are_not_neighbours(held_out: tuple[int, ...], left: set[int]) -> None:
    kept = memory(60).without(held_out)
    found = kept.search(kept.keys, WEIGHTS, 60)
    assert set(found.folds[found.usable].tolist()) == left


def test_the_result_of_a_query_does_not_depend_on_the_batch() -> None:
    kept, queries = memory(700), keys(40, seed=1)
    together = kept.search(queries, WEIGHTS, 9)
    for row in range(0, 40, 7):
        alone = kept.search(queries[row : row + 1], WEIGHTS, 9)
        assert set(alone.rows[0].tolist()) == set(together.rows[row].tolist())


def test_a_candidate_table_returns_the_search_results() -> None:
    kept = memory(90)
    found = kept.search(kept.keys, WEIGHTS, 90, kept.groups)
    table = CandidateTable(kept, torch.where(found.usable, found.rows, -1).int(), found.similarities.half())
    rows = torch.tensor([5, 0, 89])
    again = table.of(rows)
    assert torch.equal(again.usable, found.usable[rows])
    assert torch.equal(again.rows[again.usable], found.rows[rows][again.usable])
    assert torch.equal(again.log_prices[again.usable], found.log_prices[rows][again.usable])
    assert torch.equal(again.similarities, found.similarities[rows])


def candidates(log_prices: Tensor, seed: int = 0) -> Candidates:
    """Random similarities of 4 rows and as many candidates as there are prices."""
    n = len(log_prices)
    similarities = torch.rand(4, n, 5, generator=torch.Generator().manual_seed(seed)) / 5
    rows = torch.arange(n).expand(4, n)
    return Candidates(rows, similarities, log_prices.expand(4, n), rows % 3, torch.ones(4, n, dtype=torch.bool))


def attention() -> Neighbours:
    torch.manual_seed(0)
    return Neighbours(5, dropout=0.0)


def test_the_price_is_the_mean_weighted_by_the_softmax() -> None:
    known, model = candidates(torch.linspace(0, 5, 8)), attention().eval()
    usable = known.usable.clone()
    usable[1, 3:], usable[2] = False, False
    found = model(known, usable, torch.tensor(2.0))
    with torch.no_grad():
        logits = (known.similarities * band_weights(model.change).float()).sum(2)
        logits += 10 * model.correction(4 * known.similarities).squeeze(2)
    for row in (0, 1, 3):
        weights = np.exp(logits[row][usable[row]].double().numpy())
        weights /= weights.sum()
        prices = known.log_prices[row][usable[row]].double().numpy()
        mean = (weights * prices).sum()
        assert found.log_price[row].item() == pytest.approx(mean, rel=1e-5)
        assert found.deviation[row].item() == pytest.approx(np.sqrt((weights * (prices - mean) ** 2).sum()), rel=1e-4)
    assert found.weights.sum(1).tolist() == pytest.approx([1, 1, 0, 1])
    assert not found.weights[~usable].any() and found.log_price[2] == 2.0, "the median, where there are none"


def test_features_of_a_neighbourhood_have_no_gradient() -> None:
    found = attention()(candidates(torch.linspace(0, 5, 8)), torch.ones(4, 8, dtype=torch.bool), torch.tensor(2.0))
    assert not found.features.requires_grad and found.log_price.requires_grad
    assert found.features.isfinite().all() and found.features.shape == (4, 4 + 5)


def test_each_weight_of_the_attention_affects_the_price() -> None:
    """AdamW turns the rounding of a gradient that is 0 into steps of full length, other ones on more ranks."""
    known, model = candidates(torch.linspace(0, 5, 8).double()), attention().double()
    known = replace(known, similarities=known.similarities.double())
    model(known, known.usable, torch.tensor(2.0)).log_price.sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().min() > 1e-9, name


@pytest.mark.parametrize("dollars", [1e-6, 1.0, 1e6, 1e30])
def test_neighbours_of_equal_price_give_that_price(dollars: float) -> None:
    price = float(np.log(dollars))
    found = attention()(candidates(torch.full((8,), price)), torch.ones(4, 8, dtype=torch.bool), torch.tensor(price))
    np.testing.assert_allclose(found.log_price.detach().exp(), dollars, rtol=1e-4)
    assert found.deviation.detach().abs().max() < 1e-3
    found.log_price.sum().backward()


def test_hidden_neighbours_have_no_effect() -> None:
    torch.manual_seed(0)
    model = Neighbours(5, dropout=0.5).train()
    known = candidates(torch.linspace(0, 5, 400))
    kept = model(known, known.usable, torch.tensor(0.0)).weights > 0
    assert 0.4 < kept.float().mean() < 0.6
    assert (model.eval()(known, known.usable, torch.tensor(0.0)).weights > 0).all()


def test_bands_of_one_column() -> None:
    assert bands_of({"a": 1}).tolist() == [0]
    assert bands_of({"a": 8, "b": 1}).tolist() == [0] * 8 + [1]
    assert bands_of({"a": 300}).bincount().tolist() == [8, 24, 64, 96, 108]
