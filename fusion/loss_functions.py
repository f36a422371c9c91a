"""The loss functions, by name: `get_loss_function("weighted_smape")`.

Each loss is the mean over rows of a term that depends on that row alone, so splitting a batch over ranks or over steps
does not change it. All compute in float32. A finite model output of any dtype has a finite loss and gradient; a NaN
stays NaN.

SMAPE is computed from log prices: for positive prices, `|p - a| / ((a + p) / 2) = 2 tanh(|log p - log a| / 2)`. This
form can neither overflow nor divide by zero.

>>> loss = get_loss_function("smape")
>>> round(float(loss(torch.log1p(torch.tensor([110.0])), torch.log1p(torch.tensor([90.0])))), 3)
20.0
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import ConfigError, did_you_mean

PRICE_FLOOR = 0.01  # dollars; below it, log(price) continues as a straight line, so that every price has a gradient
LARGEST_PRICE = 1e9  # dollars; larger predictions are clamped, so that squares times weights stay finite in float32
LARGEST_LOG = 1e4  # the same limit for predictions of log1p(price)
# Constants of the losses that weigh rows by their price:
CHEAP, DEAR = 5.0, 200.0  # dollars; between them, the delta of adaptive Huber changes
DOUBLED_ABOVE = 100.0  # dollars; above, weighted Huber counts rows twice
PRICE_TIERS = ((0, 10), (5, 8), (10, 6), (30, 4), (60, 2), (200, 1))  # (lowest price in dollars, weight)
EDGE_TOLERANCE = 1e-6  # relative; log1p and expm1 in float32 may move a price at the edge of a tier by so much


class RowLoss(nn.Module):
    """Base class: the mean over rows of a term for each row, which subclasses define in `_terms`.

    Shape: prediction `[B]`, target `[B]`, both `log1p(price)`, or prices in dollars with `predict_log=False`; the
    result is a scalar. ValueError for other shapes, because `[B]` with `[B, 1]` would broadcast to `[B, B]`.
    """

    n_outputs = 1
    floor = PRICE_FLOOR  # dollars

    def __init__(self, *, predict_log: bool = True) -> None:
        super().__init__()
        self.predict_log = predict_log

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.rows(prediction, target).mean()

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The term of each row, shape `[B]`, float32. To accumulate a loss over several batches, sum these."""
        self._check_shapes(prediction, target)
        bound = LARGEST_LOG if self.predict_log else LARGEST_PRICE
        return self._terms(_bounded(prediction, bound), _bounded(target, bound))

    def measure_in(self, unit: float) -> None:
        """Scales the floor of prices by `unit`, in dollars.

        The unit is 1 except for catalogs whose prices are far below a dollar (see `PriceModel`).
        """
        for part in self.modules():
            if isinstance(part, RowLoss):
                part.floor = PRICE_FLOOR * unit

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_shapes(self, prediction: Tensor, target: Tensor) -> None:
        if target.ndim != 1 or prediction.shape != target.shape:
            raise ValueError(
                "prediction and target must both have shape [B], "
                f"however: prediction {tuple(prediction.shape)}, target {tuple(target.shape)}"
            )

    def _price(self, target: Tensor) -> Tensor:
        """True prices in dollars, for the weights of rows."""
        if self.predict_log:
            target = torch.expm1(target.clamp(max=math.log1p(LARGEST_PRICE)))
        return target.clamp(self.floor, LARGEST_PRICE)

    def _log_price(self, value: Tensor) -> Tensor:
        """log(price) above the floor, and a straight line below it, so that the gradient is never 0."""
        above = value.clamp(min=math.log1p(self.floor) if self.predict_log else self.floor)
        # With z = log1p(price), log(price) = log(expm1(z)), written here without exp(z), which overflows at z = 88.7.
        log_price = above + torch.log(-torch.expm1(-above)) if self.predict_log else torch.log(above)
        return log_price + (value - above) * (PRICE_FLOOR / self.floor)

    def _log_error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (self._log_price(prediction) - self._log_price(target)).abs()


class MSELoss(RowLoss):
    """Squared error, in the unit of the prediction."""

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square()


class MAELoss(RowLoss):
    """Absolute error, in the unit of the prediction."""

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs()


class HuberLoss(RowLoss):
    """Half the squared error up to `delta`, linear above it; Huber (1964). `delta` has the unit of the prediction."""

    def __init__(self, delta: float = 1.0, *, predict_log: bool = True) -> None:
        super().__init__(predict_log=predict_log)
        self.delta = _number("delta", delta, low=1e-6)

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _huber(prediction - target, self.delta)


class WeightedHuberLoss(HuberLoss):
    """Huber times the square root of the true price; times 2 for prices above $100."""

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        price = self._price(target)
        factor = torch.where(price > DOUBLED_ABOVE * (1 + EDGE_TOLERANCE), 2.0, 1.0)
        return factor * price.sqrt() * super()._terms(prediction, target)


class AdaptiveHuberLoss(RowLoss):
    """Huber whose delta depends on the true price.

    Delta goes from `delta_cheap` at $5 to `delta_dear` at $200, linearly in log(price), and is constant outside.
    """

    def __init__(self, delta_cheap: float = 2.0, delta_dear: float = 0.5, *, predict_log: bool = True) -> None:
        super().__init__(predict_log=predict_log)
        self.delta_cheap = _number("delta_cheap", delta_cheap, low=1e-6)
        self.delta_dear = _number("delta_dear", delta_dear, low=1e-6)

    def row_deltas(self, target: Tensor) -> Tensor:
        """The delta of each row, shape `[B]`."""
        share = torch.log(self._price(target.float()) / CHEAP) / math.log(DEAR / CHEAP)
        return self.delta_cheap + (self.delta_dear - self.delta_cheap) * share.clamp(0, 1)

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _huber(prediction - target, self.row_deltas(target))


class QuantileHuberLoss(RowLoss):
    """The pinball loss, which estimates quantiles, smoothed within `delta` of the target; Dabney et al. (2018), eq. 10.

    Shape: prediction `[B]` for one quantile, or `[B, Q]` with a column per quantile in the given order; target `[B]`. A
    row's term is the mean over the quantiles. `delta` has the unit of the prediction and should be small, because a
    large one estimates expectiles instead of quantiles.
    """

    levels: Tensor

    def __init__(self, quantiles: Sequence[float] = (0.5,), delta: float = 0.01, *, predict_log: bool = True) -> None:
        super().__init__(predict_log=predict_log)
        self.quantiles = tuple(_number("quantile", quantile, low=1e-6, high=1 - 1e-6) for quantile in quantiles)
        self.delta = _number("delta", delta, low=1e-6)
        self.n_outputs = len(self.quantiles)
        self.register_buffer("levels", torch.tensor(self.quantiles), persistent=False)
        if not self.quantiles:
            raise ValueError("quantiles must name at least one, however: ()")

    def _check_shapes(self, prediction: Tensor, target: Tensor) -> None:
        if prediction.ndim == 1 and self.n_outputs == 1:
            super()._check_shapes(prediction, target)
        elif target.ndim != 1 or prediction.shape != (len(target), self.n_outputs):
            raise ValueError(
                f"quantiles={self.quantiles} need a prediction of shape [B, {self.n_outputs}] and a target of shape "
                f"[B], however: prediction {tuple(prediction.shape)}, target {tuple(target.shape)}"
            )

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = target.unsqueeze(1) - prediction.reshape(len(target), self.n_outputs)
        quantiles = self.levels.to(error.device)
        weight = torch.where(error < 0, 1 - quantiles, quantiles)
        return (weight * _huber(error, self.delta) / self.delta).mean(dim=1)


class SMAPELoss(RowLoss):
    """SMAPE in percent, for prices of at least a cent.

    The gradient of SMAPE vanishes for large errors, as sech²(log error / 2), so rows with large errors would hardly be
    learned. For log errors above `tail`, the loss therefore continues along its tangent. The default of 2 is a factor
    of 7.4 between prediction and price, or a SMAPE of 152. `tail=None` gives the exact SMAPE.
    """

    def __init__(self, tail: float | None = 2.0, *, predict_log: bool = True) -> None:
        super().__init__(predict_log=predict_log)
        self.tail = None if tail is None else _number("tail", tail, low=1e-3)

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _smape(self._log_error(prediction, target), self.tail)


class WeightedSMAPELoss(SMAPELoss):
    """SMAPE times a weight that depends on the tier of the true price.

    The mean divides by the number of rows, not by the sum of weights. `tiers` are pairs (lowest price of the tier in
    dollars, weight), in ascending order, the first from 0.
    """

    edges: Tensor
    weights: Tensor

    def __init__(
        self, tiers: Sequence[tuple[float, float]] = PRICE_TIERS, tail: float | None = 2.0, *, predict_log: bool = True
    ) -> None:
        super().__init__(tail, predict_log=predict_log)
        starts = [_number("tier start", start) for start, _ in tiers]
        weights = [_number("tier weight", weight) for _, weight in tiers]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"tiers must be pairs (dollars, weight) that rise from 0 dollars, however: {tiers}")
        edges = torch.tensor(starts[1:], dtype=torch.float32) * (1 - EDGE_TOLERANCE)
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("weights", torch.tensor(weights), persistent=False)

    def row_weights(self, target: Tensor) -> Tensor:
        """The weight of each row, shape `[B]`."""
        tier = torch.bucketize(self._price(target.float()), self.edges.to(target.device), right=True)
        return self.weights.to(target.device)[tier]

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.row_weights(target) * super()._terms(prediction, target)


class FocalSMAPELoss(SMAPELoss):
    """SMAPE times `(SMAPE / 200) ** gamma`, so that easy rows count less; Lin et al. (2017), "Focal loss".

    The SMAPE has a linear `tail`, as in `SMAPELoss`; the factor does not. The gradient flows through the factor, too.
    """

    def __init__(self, gamma: float = 2.0, tail: float | None = 2.0, *, predict_log: bool = True) -> None:
        super().__init__(tail, predict_log=predict_log)
        self.gamma = _number("gamma", gamma)

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        log_error = self._log_error(prediction, target)
        return _focal_factor(log_error, self.gamma) * _smape(log_error, self.tail)


class HybridFocalSMAPELoss(RowLoss):
    """`(1 - weight) * base + weight * focal SMAPE / 100`, with the base "huber", "mse" or "mae"."""

    def __init__(
        self, base: str = "huber", weight: float = 0.3, gamma: float = 2.0, *, predict_log: bool = True
    ) -> None:
        super().__init__(predict_log=predict_log)
        bases: dict[str, type[RowLoss]] = {"huber": HuberLoss, "mse": MSELoss, "mae": MAELoss}
        if base not in bases:
            raise ValueError(f"base must be one of {', '.join(bases)}, however: {base=}")
        self.base = bases[base](predict_log=predict_log)
        self.focal = FocalSMAPELoss(gamma, predict_log=predict_log)
        self.weight = _number("weight", weight, high=1)

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        base, focal = self.base._terms(prediction, target), self.focal._terms(prediction, target)
        return (1 - self.weight) * base + self.weight * focal / 100


class FocalHuberLoss(HuberLoss):
    """Huber times `(SMAPE / 200) ** gamma`, so that easy rows count less. The gradient includes the factor's."""

    def __init__(self, gamma: float = 2.0, delta: float = 1.0, *, predict_log: bool = True) -> None:
        super().__init__(delta, predict_log=predict_log)
        self.gamma = _number("gamma", gamma)

    def _terms(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _focal_factor(self._log_error(prediction, target), self.gamma) * super()._terms(prediction, target)


LOSSES: dict[str, type[RowLoss]] = {
    "smape": SMAPELoss,
    "weighted_smape": WeightedSMAPELoss,
    "focal_smape": FocalSMAPELoss,
    "hybrid_focal_smape": HybridFocalSMAPELoss,
    "weighted_huber": WeightedHuberLoss,
    "quantile_huber": QuantileHuberLoss,
    "adaptive_huber": AdaptiveHuberLoss,
    "focal_huber": FocalHuberLoss,
    "huber": HuberLoss,
    "mse": MSELoss,
    "mae": MAELoss,
}


def get_loss_function(config: str | Mapping[str, Any] | object) -> RowLoss:
    """The loss that a config names.

    Args:
        config: a name, a mapping `{"name": ..., **options}`, or an object whose attribute `loss` is either.

    Raises:
        ConfigError: unknown name or option, a value that is not allowed, or several quantiles. A model predicts one
            price per row; for several quantiles, build `QuantileHuberLoss` directly.
    """
    name, options = _name_and_options(config)
    if name not in LOSSES:
        raise _unknown("loss", name, LOSSES)
    allowed = inspect.signature(LOSSES[name]).parameters
    for option in options:
        if option not in allowed:
            raise _unknown(f"option of loss {name!r}:", option, allowed)
    try:
        loss = LOSSES[name](**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss {name!r} cannot be built: {error}", f"correct the options {options}") from error
    if loss.n_outputs > 1:
        message = f"loss {name!r} needs {loss.n_outputs} predictions per row, but a model makes 1"
        raise ConfigError(message, "use 1 quantile")
    return loss


def _name_and_options(config: object) -> tuple[str, dict[str, Any]]:
    chosen = config if isinstance(config, str | Mapping) else getattr(config, "loss", config)
    if isinstance(chosen, str):
        return chosen, {}
    if isinstance(chosen, Mapping) and "name" in chosen:
        return str(chosen["name"]), {key: value for key, value in chosen.items() if key != "name"}
    remedy = f"set loss to one of {', '.join(LOSSES)}"
    raise ConfigError(f"a loss is a name or a mapping with a 'name', however: {chosen!r}", remedy)


def _unknown(what: str, given: str, allowed: Iterable[str]) -> ConfigError:
    names = list(allowed)
    remedy = did_you_mean(str(given).lower(), names, cutoff=0.5).strip() or "choose an allowed one"
    return ConfigError(f"unknown {what} {given!r}; allowed: {', '.join(names)}", remedy)


def _number(name: str, value: float, low: float = 0.0, high: float = 1e6) -> float:
    """A checked option. The limits keep every product of options, weights and errors finite in float32."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, however: {value!r}")
    return float(value)


class _Bounded(torch.autograd.Function):
    """Clamps a value to ±bound in float32, but passes the gradient through, so that rows at the bound still learn."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bound: float) -> Tensor:
        ctx.dtype = value.dtype
        return value.float().clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        largest = min(torch.finfo(ctx.dtype).max, torch.finfo(torch.float32).max)
        return gradients[0].clamp(-largest, largest).to(ctx.dtype), None


def _bounded(value: Tensor, bound: float) -> Tensor:
    bounded: Tensor = _Bounded.apply(value, bound)  # type: ignore[no-untyped-call]
    return bounded


def _huber(error: Tensor, delta: float | Tensor) -> Tensor:
    """error²/2 up to delta, and delta * (|error| - delta/2) above. Unlike torch's, it allows a delta per row."""
    size = error.abs()
    near = size.clamp(max=delta)
    return near * (size - near / 2)


def _smape(log_error: Tensor, tail: float | None) -> Tensor:
    """SMAPE in percent from |log p - log a|; along its tangent where that is more than `tail`."""
    if tail is None:
        return 200 * torch.tanh(log_error / 2)
    near = log_error.clamp(max=tail)
    slope = 100 * (1 - math.tanh(tail / 2) ** 2)
    return 200 * torch.tanh(near / 2) + slope * (log_error - near)


def _focal_factor(log_error: Tensor, gamma: float) -> Tensor:
    """(SMAPE / 200) ** gamma, from 0 to 1."""
    # Not 0, where a power below 1 has an infinite gradient.
    return torch.tanh(log_error / 2).clamp(min=1e-12) ** gamma
