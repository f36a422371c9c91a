"""Prices of any size, in any currency, are learned and predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion.loss_functions import LOSSES, get_loss_function
from fusion.metrics import compute_smape
from fusion.nn.batch import Batch
from fusion.nn.layers import ConcatNetwork
from fusion.nn.price_model import PriceModel

DIM = 4
ROWS = 400


def catalog(median: float, spread: float = 1.5) -> tuple[Tensor, np.ndarray]:
    """Vectors [N, D], and prices [N] whose logarithm is linear in them and deviates by `spread`."""
    vectors = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    logs = vectors @ torch.tensor([0.8, -0.5, 0.3, 0.1])
    logs = spread * (logs - logs.median()) / logs.std()
    return vectors, median * np.exp(logs.double().numpy())


def calibrated(vectors: Tensor, prices: np.ndarray) -> tuple[PriceModel, Tensor]:
    """The model as a training starts with it, and its targets."""
    torch.manual_seed(0)
    model = PriceModel([ConcatNetwork({"a": DIM}, 16, (16,), 0.0)], {"a": DIM})
    targets = torch.from_numpy(np.log1p(prices).astype(np.float32))
    model.calibrate({"a": (vectors.mean(0), vectors.std(0))}, targets)
    return model, targets


def smape_after(vectors: Tensor, prices: np.ndarray, loss: str = "weighted_smape", steps: int = 150) -> float:
    model, targets = calibrated(vectors, prices)
    batch = Batch({"a": vectors}, {"a": torch.ones(ROWS, dtype=torch.bool)})
    measure = get_loss_function(loss)
    measure.measure_in(float(model.get_buffer("price_unit")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    # With a constant rate, the score after the last step would depend on rounding, and so on the processor.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        measure(model(batch).price.squeeze(1), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        return compute_smape(prices, model.eval().price(batch))


@pytest.mark.parametrize("median", [1e-30, 1e-8, 1e-4, 0.03, 0.5, 20.0, 3e6, 1e12, 1e30])
def test_prices_of_any_size_are_learned(median: float) -> None:
    vectors, prices = catalog(median)
    of_the_median = compute_smape(prices, np.full(ROWS, np.median(prices)))
    assert smape_after(vectors, prices) < of_the_median / 3


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("median", [1e-4, 3e6])
def test_every_loss_learns_them(loss: str, median: float) -> None:
    """From dong, 100,000 to 100 million, to bitcoin; the gradients of losses in dollars are tiny there, and slow."""
    vectors, prices = catalog(median)
    of_the_median = compute_smape(prices, np.full(ROWS, np.median(prices)))
    assert smape_after(vectors, prices, loss) < of_the_median / 1.25


def test_one_extreme_price_does_not_affect_the_others() -> None:
    vectors, prices = catalog(20.0)
    expected = smape_after(vectors, prices)
    prices[7] = 1e308
    assert smape_after(vectors, prices) < expected + 2


def test_usual_catalogs_are_calibrated_as_in_earlier_versions() -> None:
    """The spread is the plain deviation, and the unit a dollar, so that weights keep their bytes."""
    for median in (0.2, 20.0, 5000.0):
        model, targets = calibrated(*catalog(median))
        assert model.get_buffer("price_unit") == 1
        assert torch.equal(model.get_buffer("target_scale"), targets.std())
        assert torch.equal(model.get_buffer("target_median"), targets.median())


@pytest.mark.parametrize("median", [1e-4, 20.0, 3e6])
def test_predictions_stay_within_ten_times_the_training_prices(median: float) -> None:
    vectors, prices = catalog(median)
    model, _ = calibrated(vectors, prices)
    model.get_buffer("target_scale").fill_(1e6)
    with torch.inference_mode():
        found = model.eval().price(Batch({"a": vectors}, {"a": torch.ones(ROWS, dtype=torch.bool)}))
    assert found.min() == pytest.approx(prices.min() / 10, rel=1e-3)
    assert found.max() == pytest.approx(prices.max() * 10, rel=1e-3)


def test_a_nan_stays_nan() -> None:
    model, _ = calibrated(*catalog(20.0))
    model.get_buffer("target_scale").fill_(float("nan"))
    assert model.eval().price(Batch({"a": torch.ones(1, DIM)}, {"a": torch.ones(1, dtype=torch.bool)})).isnan().all()


@pytest.mark.parametrize("median", [1e-4, 20.0])
@pytest.mark.parametrize("output", [-1e30, -50.0, 0.0, 39.0, 1e30])
def test_any_output_has_a_gradient(output: float, median: float) -> None:
    model, _ = calibrated(*catalog(median))
    unit = float(model.get_buffer("price_unit"))
    value = torch.tensor([output], requires_grad=True)
    loss = get_loss_function("smape")
    loss.measure_in(unit)
    loss(model._in_dollars(value), torch.tensor([np.log1p(median)]).float()).backward()
    assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs() > 1e-3


def test_a_model_of_an_earlier_version_has_its_bounds() -> None:
    vectors, prices = catalog(20.0)
    model, _ = calibrated(vectors, prices)
    added = ("price_unit", "lowest_price", "highest_price")
    state: Mapping[str, Any] = {name: value for name, value in model.state_dict().items() if name not in added}
    model.load_state_dict(state)
    assert [float(model.get_buffer(name)) for name in added] == [1.0, 0.01, 1e7]


def test_a_model_of_an_earlier_version_has_one_network() -> None:
    vectors, prices = catalog(20.0)
    batch = Batch({"a": vectors}, {"a": torch.ones(ROWS, dtype=torch.bool)})
    model, _ = calibrated(vectors, prices)
    for weight in model.parameters():
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    state = {name.replace("members.0.network.", "network."): value for name, value in model.state_dict().items()}
    assert any(name.startswith("network.") for name in state)
    again, _ = calibrated(vectors, prices)
    assert not torch.equal(again.eval().price(batch), model.eval().price(batch))
    again.load_state_dict(state)
    assert torch.equal(again.eval().price(batch), model.eval().price(batch))
