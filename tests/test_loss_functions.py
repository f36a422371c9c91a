"""The losses: exact values, gradients of large errors, and independence of how rows are split into batches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fusion.errors import ConfigError
from fusion.loss_functions import (
    LOSSES,
    AdaptiveHuberLoss,
    FocalHuberLoss,
    FocalSMAPELoss,
    HuberLoss,
    HybridFocalSMAPELoss,
    MSELoss,
    QuantileHuberLoss,
    SMAPELoss,
    WeightedHuberLoss,
    WeightedSMAPELoss,
    get_loss_function,
)
from fusion.metrics import compute_smape, row_smape

EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)
BOTH_SPACES = pytest.mark.parametrize("predict_log", [True, False])
TIER_PRICES = [0.5, 4.99, 5, 9.99, 10, 29.99, 30, 59.99, 60, 199.99, 200, 5000]
TIER_WEIGHTS = [10, 10, 8, 8, 6, 6, 4, 4, 2, 2, 1, 1]


def draw_prices(n_rows: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """True prices around $20, and predictions that differ from them by a factor of about exp(spread)."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.exp(3 + torch.randn(n_rows, generator=generator))
    return true, true * torch.exp(spread * torch.randn(n_rows, generator=generator))


def model_space(price: Tensor | list[float], predict_log: bool) -> Tensor:
    price = torch.as_tensor(price, dtype=torch.float64)
    return (torch.log1p(price) if predict_log else price).float()


def gradient(loss: nn.Module, prediction: Tensor, target: Tensor) -> Tensor:
    prediction = prediction.clone().requires_grad_()
    loss(prediction, target).backward()
    assert prediction.grad is not None
    return prediction.grad


@EVERY_LOSS
@BOTH_SPACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_finite_output_has_a_finite_loss_and_gradient(name: str, predict_log: bool, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    outputs = [largest, -largest, 65504, -65504, 88.7, 89, -88.7, 11.1, 710, 1e4, -1e4, 1, 0.00995, 1e-7, -1e-7, 0.0]
    prediction = torch.tensor(outputs).to(dtype)
    loss = LOSSES[name](predict_log=predict_log)
    for price in (0.01, 0.5, 20.0, 1e5):
        target = model_space([price] * len(outputs), predict_log)
        rows = loss.rows(prediction, target)
        assert rows.dtype == torch.float32 and rows.isfinite().all() and (rows >= 0).all()
        assert loss(prediction, target).isfinite()
        assert gradient(loss, prediction, target).isfinite().all()
        assert gradient(loss, target.to(dtype), target.to(dtype)).isfinite().all()  # where |error| has a kink
        for row in range(len(outputs)):  # alone, undivided by the batch
            assert gradient(loss, prediction[row : row + 1], target[row : row + 1]).isfinite().all()


@EVERY_LOSS
@BOTH_SPACES
def test_any_finite_target_has_a_finite_loss_and_gradient(name: str, predict_log: bool) -> None:
    target = torch.tensor([3e38, 100.0, 88.7, 0.0, -3e38])
    loss = LOSSES[name](predict_log=predict_log)
    assert loss(torch.zeros(5), target).isfinite()
    assert gradient(loss, torch.zeros(5), target).isfinite().all()


@EVERY_LOSS
def test_the_gradient_of_a_large_error_does_not_vanish(name: str) -> None:
    loss, target = LOSSES[name](), model_space([20.0], True)
    near = gradient(loss, target + 1.5, target).abs()
    for output in (-3e38, -1e4, -100.0, -1.0, 0.0, 8.0, 20.0, 88.7, 1e4, 3e38):
        pull = gradient(loss, torch.tensor([output]), target)
        assert torch.sign(pull) == math.copysign(1, output - target.item())
        assert pull.abs() > near / 4


@EVERY_LOSS
def test_the_gradient_of_a_large_error_does_not_vanish_for_prices(name: str) -> None:
    loss, target = LOSSES[name](predict_log=False), torch.tensor([20.0])
    for output in (-3e38, -100.0, -1.0, 0.0, 200.0, 1e5):
        assert torch.sign(gradient(loss, torch.tensor([output]), target)) == math.copysign(1, output - 20)


def test_the_tail_keeps_the_gradient_of_smape_from_vanishing() -> None:
    prediction, target = torch.tensor([12.0]), model_space([20.0], True)
    assert gradient(SMAPELoss(tail=None), prediction, target) < 0.1
    assert gradient(SMAPELoss(), prediction, target).item() == pytest.approx(100 / math.cosh(1) ** 2, rel=1e-4)


@EVERY_LOSS
@BOTH_SPACES
def test_a_perfect_prediction_has_no_loss(name: str, predict_log: bool) -> None:
    loss = LOSSES[name](predict_log=predict_log)
    target = model_space(draw_prices(100, 0)[0], predict_log)
    assert loss(target, target).item() == pytest.approx(0, abs=1e-6)
    assert loss(target + 0.1, target) > loss(target + 0.05, target) > 0


@BOTH_SPACES
def test_the_smape_loss_equals_the_metric(predict_log: bool) -> None:
    true, pred = draw_prices(1000, 0.5)
    prediction, target = model_space(pred, predict_log), model_space(true, predict_log)
    assert (torch.log(pred / true).abs() < 2).all()
    for loss in (SMAPELoss(predict_log=predict_log), SMAPELoss(tail=None, predict_log=predict_log)):
        assert loss(prediction, target).item() == pytest.approx(compute_smape(true, pred), rel=1e-5)


def test_the_smape_loss_is_the_metric_up_to_the_tail_and_its_tangent_above() -> None:
    true = torch.full((5,), 50.0)
    log_error = torch.tensor([-4.0, -2.0, 1.0, 2.0, 3.0])
    prediction, target = model_space(true * torch.exp(log_error), True), model_space(true, True)
    exact = torch.tensor(row_smape(true, true * torch.exp(log_error))).float()
    beyond = 100 / math.cosh(1) ** 2 * torch.tensor([2.0, 0, 0, 0, 1])
    start = 200 * torch.tanh(log_error.abs().clamp(max=2) / 2)
    torch.testing.assert_close(SMAPELoss(tail=None).rows(prediction, target), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(SMAPELoss().rows(prediction, target), start + beyond, rtol=1e-4, atol=0)


@BOTH_SPACES
def test_tiers_include_their_lower_edge_and_have_their_weights(predict_log: bool) -> None:
    target = model_space(TIER_PRICES, predict_log)
    prediction = model_space([1.2 * price for price in TIER_PRICES], predict_log)
    weighted = WeightedSMAPELoss(predict_log=predict_log).rows(prediction, target)
    plain = SMAPELoss(predict_log=predict_log).rows(prediction, target)
    torch.testing.assert_close(weighted / plain, torch.tensor(TIER_WEIGHTS, dtype=torch.float32))


def test_a_price_on_an_edge_belongs_to_the_tier_above() -> None:
    cents = torch.arange(1, 40001, dtype=torch.float64) / 100
    expected = torch.tensor([10.0, 8, 6, 4, 2, 1])[
        torch.bucketize(cents, torch.tensor([5.0, 10, 30, 60, 200]), right=True)
    ]
    for predict_log in (True, False):
        loss = WeightedSMAPELoss(predict_log=predict_log)
        assert torch.equal(loss.row_weights(model_space(cents, predict_log)), expected)


def test_weighted_smape_divides_by_the_number_of_rows() -> None:
    target, prediction = model_space([1.0, 1000.0], True), model_space([1.1, 1100.0], True)
    smape = 200 * 0.1 / 2.1
    assert WeightedSMAPELoss()(prediction, target).item() == pytest.approx((10 * smape + smape) / 2, rel=1e-4)
    assert WeightedSMAPELoss([(0, 1), (500, 3)])(prediction, target).item() == pytest.approx(2 * smape, rel=1e-4)


@EVERY_LOSS
@BOTH_SPACES
def test_any_split_of_a_batch_gives_the_same_loss(name: str, predict_log: bool) -> None:
    loss = LOSSES[name](predict_log=predict_log)
    prediction, target = (model_space(price, predict_log) for price in reversed(draw_prices(64, 1.5)))
    whole = loss(prediction, target).item()
    for sizes in ([63, 1], [10, 20, 34], [1] * 64):
        parts = zip(prediction.split(sizes), target.split(sizes), sizes, strict=True)
        assert sum(loss(p, t).item() * size for p, t, size in parts) / 64 == pytest.approx(whole, rel=1e-5)
    assert loss.rows(prediction, target).mean().item() == pytest.approx(whole)


def test_quantile_huber_estimates_its_quantiles() -> None:
    quantiles = (0.1, 0.5, 0.9)
    target = torch.tensor(np.random.default_rng(0).exponential(1.0, 2000), dtype=torch.float32)
    estimate = nn.Parameter(torch.ones(3))
    loss, optimizer = QuantileHuberLoss(quantiles), torch.optim.Adam([estimate], lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(400):
        optimizer.zero_grad()
        loss(estimate.expand(len(target), 3), target).backward()
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(estimate.detach().numpy(), np.quantile(target.numpy(), quantiles), atol=0.02)


def test_quantile_huber_expects_one_column_per_quantile() -> None:
    target = torch.tensor([1.0, 2.0])
    one, three = QuantileHuberLoss((0.9,)), QuantileHuberLoss((0.1, 0.5, 0.9))
    assert one(target - 1, target).item() == pytest.approx(0.9 * (1 - 0.005))
    assert one((target - 1)[:, None], target) == one(target - 1, target)
    assert one(target + 1, target).item() == pytest.approx(0.1 * (1 - 0.005))
    for loss, prediction in (
        (three, target),
        (three, target[:, None]),
        (one, torch.zeros(2, 3)),
        (one, torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match=r"prediction \(.*target \(2,\)"):
            loss(prediction, target)
    with pytest.raises(ValueError, match=r"\(0\.1, 0\.5, 0\.9\).*however: prediction \(2, 2\)"):
        three(torch.zeros(2, 2), target)


def test_huber_mse_and_mae_equal_torch() -> None:
    prediction, target = torch.linspace(-5, 9, 50), torch.linspace(3, 4, 50)
    for delta in (0.5, 1.0, 3.0):
        expected = functional.huber_loss(prediction, target, delta=delta)
        torch.testing.assert_close(HuberLoss(delta)(prediction, target), expected)
    torch.testing.assert_close(MSELoss()(prediction, target), functional.mse_loss(prediction, target))
    torch.testing.assert_close(LOSSES["mae"]()(prediction, target), functional.l1_loss(prediction, target))


@BOTH_SPACES
def test_weighted_huber_weighs_by_the_root_of_the_price_and_doubles_above_100(predict_log: bool) -> None:
    target = model_space([4.0, 25.0, 100.0, 100.01, 400.0], predict_log)
    loss = WeightedHuberLoss(predict_log=predict_log)
    weights = loss.rows(target + 0.5, target) / HuberLoss(predict_log=predict_log).rows(target + 0.5, target)
    torch.testing.assert_close(weights, torch.tensor([2.0, 5, 10, 2 * math.sqrt(100.01), 40]), rtol=1e-5, atol=0)


@BOTH_SPACES
def test_adaptive_huber_has_a_larger_delta_for_cheap_rows(predict_log: bool) -> None:
    target = model_space([1.0, 5.0, math.sqrt(5 * 200), 200.0, 5000.0], predict_log)
    deltas = torch.tensor([2.0, 2.0, 1.25, 0.5, 0.5])
    loss = AdaptiveHuberLoss(predict_log=predict_log)
    torch.testing.assert_close(loss.row_deltas(target), deltas, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.rows(target + 3, target), deltas * (3 - deltas / 2), rtol=1e-3, atol=0)


def test_focal_factors_follow_their_formula() -> None:
    true, pred = draw_prices(100, 0.5)
    prediction, target = model_space(pred, True), model_space(true, True)
    smape = torch.tensor(row_smape(true, pred)).float()
    focal, huber = smape * (smape / 200) ** 2, HuberLoss().rows(prediction, target)
    torch.testing.assert_close(FocalSMAPELoss().rows(prediction, target), focal, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(FocalSMAPELoss(0).rows(prediction, target), smape, rtol=1e-3, atol=1e-4)
    expected = (smape / 200) ** 2 * huber
    torch.testing.assert_close(FocalHuberLoss().rows(prediction, target), expected, rtol=1e-3, atol=1e-6)
    for base in ("huber", "mse", "mae"):
        expected = 0.7 * LOSSES[base]().rows(prediction, target) + 0.3 * focal / 100
        torch.testing.assert_close(HybridFocalSMAPELoss(base).rows(prediction, target), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradients_are_finite_without_an_error(gamma: float) -> None:
    target = model_space([20.0], True)
    for loss in (FocalSMAPELoss(gamma), FocalHuberLoss(gamma)):
        assert gradient(loss, target, target).isfinite()


def test_losses_have_the_names_of_the_config() -> None:
    classes = {name: loss.__name__ for name, loss in LOSSES.items()}
    assert classes == {
        "smape": "SMAPELoss",
        "weighted_smape": "WeightedSMAPELoss",
        "focal_smape": "FocalSMAPELoss",
        "hybrid_focal_smape": "HybridFocalSMAPELoss",
        "weighted_huber": "WeightedHuberLoss",
        "quantile_huber": "QuantileHuberLoss",
        "adaptive_huber": "AdaptiveHuberLoss",
        "focal_huber": "FocalHuberLoss",
        "huber": "HuberLoss",
        "mse": "MSELoss",
        "mae": "MAELoss",
    }


@EVERY_LOSS
def test_every_loss_is_built_from_the_config(name: str) -> None:
    for config in (name, {"name": name}, SimpleNamespace(loss=name), SimpleNamespace(loss={"name": name})):
        loss = get_loss_function(config)
        assert type(loss) is LOSSES[name] and isinstance(loss, nn.Module) and loss.predict_log
        value = loss(torch.zeros(4), model_space([1.0, 10, 100, 1000], True))
        assert value.ndim == 0 and value > 0


def test_options_reach_the_loss_and_are_not_saved_in_its_state() -> None:
    assert get_loss_function({"name": "focal_smape", "gamma": 1.5, "predict_log": False}).gamma == 1.5
    assert get_loss_function({"name": "huber", "predict_log": False}).predict_log is False
    assert not any(LOSSES[name]().state_dict() for name in LOSSES)


@pytest.mark.parametrize(
    ("config", "message", "remedy"),
    [
        ("weighted_smap", "unknown loss 'weighted_smap'; allowed: smape, weighted_smape", "mean weighted_smape"),
        ("WeightedSMAPELoss", "unknown loss", "mean weighted_smape"),
        ("xyz", "unknown loss 'xyz'; allowed: smape,", "choose"),
        ({"name": "huber", "dleta": 2}, "option of loss 'huber': 'dleta'; allowed: delta, predict_log", "mean delta"),
        ({"gamma": 2}, "a mapping with a 'name'", "weighted_smape"),
        (SimpleNamespace(los="mse"), "a loss is a name", "weighted_smape"),
        (None, "a loss is a name", "weighted_smape"),
        ({"name": "huber", "delta": 0}, "delta must be a number from 1e-06 to 1e\\+06, however: 0", "delta"),
        ({"name": "huber", "delta": "1e-3"}, "delta must be a number .* however: '1e-3'", "delta"),
        ({"name": "smape", "tail": math.nan}, "tail must be a number", "tail"),
        ({"name": "hybrid_focal_smape", "base": "l2"}, "base must be one of huber, mse, mae", "base"),
        ({"name": "weighted_smape", "tiers": [[5, 1], [0, 2]]}, "rise from 0 dollars", "tiers"),
        ({"name": "weighted_smape", "tiers": 3}, "cannot be built", "tiers"),
        ({"name": "quantile_huber", "quantiles": [1.5]}, "quantile must be", "quantiles"),
        ({"name": "quantile_huber", "quantiles": []}, "at least one", "quantiles"),
        ({"name": "quantile_huber", "quantiles": [0.1, 0.9]}, "needs 2 predictions per row", "quantile"),
    ],
)
def test_an_invalid_option_names_the_allowed_values(config: Any, message: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        get_loss_function(config)
    assert remedy in caught.value.remedy


@EVERY_LOSS
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    loss = LOSSES[name]()
    for prediction, target in (
        (torch.zeros(3), torch.zeros(3, 1)),
        (torch.zeros(3), torch.zeros(1)),
        (torch.zeros(()),) * 2,
    ):
        with pytest.raises(ValueError, match="however: prediction"):
            loss(prediction, target)


@EVERY_LOSS
def test_a_nan_output_gives_a_nan_loss(name: str) -> None:
    assert LOSSES[name]()(torch.tensor([math.nan, 1.0]), torch.ones(2)).isnan()
