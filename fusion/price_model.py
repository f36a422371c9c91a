"""`PriceModel`: a variant's network between standardised inputs and a price, with all that prediction needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion.layers import Inputs, uniform

# A prediction may leave the range of the training prices by this factor, and is bounded there: what lies further out is
# an extrapolation that no training row supports. A catalog rarely changes by more between two trainings.
MARGIN = 10.0
# Prices are measured in dollars, and log1p tells them apart well from there upwards. Below it log1p is a straight line:
# catalogs with such a median (prices in bitcoin, of single screws) are measured in a tenth of their median instead.
SMALLEST_MEDIAN = 0.1
# The spread of the targets is their deviation, unless a few extreme prices make it many times that of the middle half:
# one price of 1e308 among 200 would spread the first predictions over 40 orders of magnitude.
EXTREME_SPREAD = 3.0  # 1 for normally distributed log prices, at most 1.6 in the catalogs tried
LARGEST_OUTPUT = 40.0  # beyond it exp leaves float32 soon, and the output goes on as a straight line
LARGEST_LOG_PRICE = 709.78  # expm1 of more is not finite in float64
UNBOUNDED = {"price_unit": 1.0, "lowest_price": 0.0, "highest_price": math.inf}  # before the training prices are known
EARLIER_BOUNDS = {"price_unit": 1.0, "lowest_price": 0.01, "highest_price": 1e7}
LARGEST_INPUT = 8.0  # standard deviations


class PriceModel(nn.Module):
    """A variant's network between standardised inputs and a price, with everything that prediction needs in its state.

    Inputs are standardised with the training rows' mean and deviation; columns that are constant but for rounding
    count for nothing. The output starts at the median of the training targets, and a row without any embedding gets
    exactly that. In training, sources are hidden from rows at random, so that a missing one means something.

    Args:
        network: `forward({role: [B, D_role]}, {role: [B] bool}) -> [B]`, and optionally
            `explained(same) -> ([B], {name: [B, …]})`, which also tells of its inner choices.
        dims: role to D_role.
        modality_dropout: probability that a source is hidden from a row.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, dims: Mapping[str, int], modality_dropout: float) -> None:
        super().__init__()
        self.network, self.dims, self.modality_dropout = network, dict(dims), modality_dropout
        for role, dim in dims.items():
            self.register_buffer(f"mean_{role}", torch.zeros(dim))
            self.register_buffer(f"scale_{role}", torch.ones(dim))
        self.register_buffer("target_median", torch.zeros(()))
        self.register_buffer("target_scale", torch.ones(()))
        for name, value in UNBOUNDED.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_complete)  # type: ignore[no-untyped-call]

    def calibrate(self, statistics: Mapping[str, tuple[Tensor, Tensor]], targets: Tensor) -> None:
        """Sets the inputs' {role: (mean [D], deviation [D])} and, from training targets [N], where outputs start."""
        for role, (mean, deviation) in statistics.items():
            usable = deviation > 1e-4 * deviation.median() + 1e-6 * mean.abs()
            self.get_buffer(f"mean_{role}").copy_(mean)
            self.get_buffer(f"scale_{role}").copy_(torch.where(usable, 1 / deviation.clamp_min(1e-30), 0.0))
        median, lowest, highest = torch.expm1(torch.stack([targets.median(), *targets.aminmax()]).double())
        unit = torch.where(median < SMALLEST_MEDIAN, median / 10, 1.0)
        self.get_buffer("price_unit").copy_(unit)
        self.get_buffer("lowest_price").copy_(lowest / MARGIN)
        self.get_buffer("highest_price").copy_((highest * MARGIN).clamp(max=torch.finfo(torch.float64).max))
        if unit != 1:
            targets = torch.log1p(torch.expm1(targets.double()) / unit).float()
        self.get_buffer("target_median").copy_(targets.median())
        self.get_buffer("target_scale").copy_(_spread(targets))

    def forward(self, inputs: Inputs, present: Inputs) -> Tensor:
        """[B] log1p(price)."""
        present = self._hidden(present)
        return self._target(self.network(self.standardised(inputs, present), present), present)

    def price(self, inputs: Inputs, present: Inputs) -> Tensor:
        """[B] dollars, float64, within a factor of `MARGIN` of the training prices."""
        return self._to_price(self(inputs, present))

    def explained(self, inputs: Inputs, present: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """[B] dollars, and the network's inner choices, such as {"gate": [B, E]}; none if it explains nothing."""
        explained = getattr(self.network, "explained", None)
        if explained is None:
            return self.price(inputs, present), {}
        output, choices = explained(self.standardised(inputs, present), present)
        return self._to_price(self._target(output, present)), choices

    def _target(self, output: Tensor, present: Inputs) -> Tensor:
        output = output.float() * self.get_buffer("target_scale") + self.get_buffer("target_median")
        known = torch.stack(list(present.values())).any(0)
        return self._in_dollars(torch.where(known, output, self.get_buffer("target_median")))

    def _to_price(self, target: Tensor) -> Tensor:
        """Finite and within the bounds, from any log1p(price); a NaN stays one."""
        lowest, highest = self.get_buffer("lowest_price"), self.get_buffer("highest_price")
        return torch.expm1(target.double().clamp(max=LARGEST_LOG_PRICE)).clamp(lowest, highest)

    def _in_dollars(self, output: Tensor) -> Tensor:
        """[B] log1p(price) from log1p(price / unit); below 0 and beyond `LARGEST_OUTPUT` along the tangents."""
        unit = self.get_buffer("price_unit").float()
        inner = output.clamp(0, LARGEST_OUTPUT)
        below, beyond = output.clamp(max=0), (output - LARGEST_OUTPUT).clamp(min=0)
        return torch.where(unit == 1, output, torch.log1p(unit * torch.expm1(inner)) + unit * below + beyond)

    def standardised(self, inputs: Inputs, present: Inputs) -> dict[str, Tensor]:
        """{role: [B, D_role]} as the network gets them: in deviations of the training rows, zeros where missing."""
        scaled = {}
        for role, x in inputs.items():
            x = (x - self.get_buffer(f"mean_{role}")) * self.get_buffer(f"scale_{role}")
            scaled[role] = torch.where(present[role].unsqueeze(-1), x.clamp(-LARGEST_INPUT, LARGEST_INPUT), 0.0)
        return scaled

    def _hidden(self, present: Inputs) -> Inputs:
        if not self.training or self.modality_dropout == 0:
            return present
        stacked = torch.stack(list(present.values()), dim=1)
        kept = stacked & (uniform(stacked) >= self.modality_dropout)
        kept = torch.where(kept.any(1, keepdim=True), kept, stacked)  # never hide all there is
        return dict(zip(present, kept.unbind(1), strict=True))


def _complete(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Models of earlier versions had fixed bounds."""
    for name, value in EARLIER_BOUNDS.items():
        state.setdefault(f"{prefix}{name}", torch.tensor(value, dtype=torch.float64))


def _spread(targets: Tensor) -> Tensor:
    """The deviation of targets [N], or of their middle half if a few extreme ones inflate it."""
    if len(targets) < 2:
        return torch.ones(())
    deviation, ordered = targets.std(), targets.sort().values  # torch.quantile refuses more than 16 million values
    normal = (ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]) / 1.349  # quartiles of a normal distribution
    is_inflated = (normal > 0) & (deviation > EXTREME_SPREAD * normal)
    return torch.where(is_inflated, normal, deviation).clamp_min(1e-3)
