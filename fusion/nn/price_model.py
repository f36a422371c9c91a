"""`PriceModel`: predicts prices from embeddings, with a variant's networks and a kernel regression on neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.nn.batch import Batch
from fusion.nn.draws import kept, mask, normal
from fusion.nn.layers import Inputs
from fusion.nn.members import Member, Members
from fusion.nn.neighbours import FIRST_WEIGHT, N_FACTS, Candidates, Memory, Neighbourhood, Neighbours, bands_of

# Predictions are clamped to the range of the training prices, extended by this factor on both sides. A price further
# out would be an extrapolation that no training row supports. A catalog's prices rarely change by more between
# trainings.
MARGIN = 10.0
# The unit of prices is the dollar if the median price is at least this, in dollars. Below a dollar, log1p(price) is
# nearly linear, so it no longer resolves relative differences. Catalogs with a lower median (prices in bitcoin, or of
# single screws) use a tenth of their median as the unit instead.
SMALLEST_MEDIAN = 0.1
# Outputs are scaled by the standard deviation of the targets, unless a few extreme prices make it more than this many
# times the deviation that the quartiles suggest. One price of 1e308 among 200 would otherwise spread the first
# predictions over 40 orders of magnitude. The ratio is 1 for normally distributed log prices, and was at most 1.6 in
# the catalogs tried.
EXTREME_SPREAD = 3.0
LARGEST_OUTPUT = 40.0  # above it, outputs continue along the tangent; exp would overflow float32 at 88.7
LARGEST_LOG_PRICE = 709.78  # the largest value whose expm1 is finite in float64
UNBOUNDED = {"price_unit": 1.0, "lowest_price": 0.0, "highest_price": math.inf}  # until `calibrate` sets them
EARLIER_BOUNDS = {"price_unit": 1.0, "lowest_price": 0.01, "highest_price": 1e7}  # fixed bounds of earlier versions
# Standard deviations at which inputs are clamped. It only affects outliers, such as values of columns that are nearly
# constant in the training rows.
LARGEST_INPUT = 8.0
NEIGHBOURHOOD = "neighbourhood"  # the role of the features of a row's neighbours, beside the roles of embeddings
N_COMPARABLES = 5  # neighbours that are listed with each prediction


@dataclass(frozen=True)
class Options:
    """Settings of a model beside its networks. The defaults are one member, without components and neighbours.

    Attributes:
        held_out: for each member, the part of the split that it does not train on.
        components: principal components per role; 0: roles are not projected.
        neighbours: number of candidate neighbours per row; 0: no kernel regression.
        neighbour_dropout, input_dropout, modality_dropout: shares of candidates, inputs and roles hidden in training.
        input_noise: standard deviation of the noise added in training, relative to that of the inputs.
    """

    held_out: tuple[int, ...] = (0,)
    components: int = 0
    neighbours: int = 0
    neighbour_dropout: float = 0.0
    input_dropout: float = 0.0
    input_noise: float = 0.0
    modality_dropout: float = 0.0


@dataclass(frozen=True)
class Targets:
    """The outputs on which the loss is computed, for B rows and M members.

    Attributes:
        price: [B, M] predicted log1p(price).
        neighbours: [B, M] the same from the kernel regression alone; None without neighbours.
    """

    price: Tensor
    neighbours: Tensor | None = None


class PriceModel(nn.Module):
    """An ensemble of a variant's networks that predicts prices from embeddings.

    Its state dict contains everything that a prediction needs except the memory. Inputs are standardised with the mean
    and deviation of the training rows; columns that are constant except for rounding are set to 0. A row without any
    embedding gets the median of the training prices. In training, roles are hidden from rows at random, so that the
    networks learn to predict without them.

    Without neighbours, the predicted target is the median of the training targets plus the network's scaled output.
    With neighbours, each role is projected on its principal components, a kernel regression on the row's neighbours
    gives a log price, and the network's scaled output is added to it. The network gets features of the neighbours as
    one more role, `neighbourhood`.

    Members are trained independently, side by side. The log price of a row of the split is the mean over the members
    that hold out the row's part; that of any other row is the mean over all members.

    Args:
        networks: one per member, with `forward({role: [B, D_role]}, {role: [B] bool}) -> [B]`, and optionally
            `explained(same) -> ([B], {name: [B, …]})`, which also returns inner values such as the gate.
        dims: role to D_role.
    """

    def __init__(self, networks: Sequence[nn.Module], dims: Mapping[str, int], options: Options = Options()) -> None:
        super().__init__()
        self.dims, self.options = dict(dims), options
        projected = _projected(dims, options)
        for role, dim in dims.items():
            self.register_buffer(f"mean_{role}", torch.zeros(dim))
            self.register_buffer(f"scale_{role}", torch.ones(dim))
            if options.components:
                self.register_buffer(f"components_{role}", torch.zeros(dim, projected[role]))
        self.register_buffer("target_median", torch.zeros(()))
        self.register_buffer("target_scale", torch.ones(()))
        for name, value in UNBOUNDED.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        bands = bands_of(projected)
        if options.neighbours:
            self.register_buffer("search_weights", torch.full((int(bands.max()) + 1,), FIRST_WEIGHT))
        members = [Member(network, _neighbours(bands, options)) for network in networks]
        self.members = Members(members, options.held_out)
        self.memory: Memory | None = None
        self.n_comparables = N_COMPARABLES
        self.named_rows = pd.Series(dtype=float)  # the memory's rows, in its order: prices in dollars by sample id
        self.register_load_state_dict_pre_hook(_complete)  # type: ignore[no-untyped-call]

    def calibrate(self, statistics: Mapping[str, tuple[Tensor, Tensor]], targets: Tensor) -> None:
        """Sets how inputs are standardised and, from the training rows, the median, scale and bounds of prices.

        Args:
            statistics: role to (mean [D], deviation [D]) of the training rows.
            targets: [N] log1p(price) of the training rows.
        """
        for role, (mean, deviation) in statistics.items():
            # Excludes columns whose deviation is tiny relative to the other columns, or is float32 rounding of the
            # mean.
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

    def set_components(self, components: Mapping[str, np.ndarray]) -> None:
        """Sets the projections {role: [D, P]}, which are scaled so that projected values have a mean square of 1."""
        for role, values in components.items():
            self.get_buffer(f"components_{role}").copy_(torch.from_numpy(values))

    def components(self) -> dict[str, Tensor]:
        """The projections {role: [D, P]}."""
        return {role: self.get_buffer(f"components_{role}") for role in self.dims}

    def set_search_weights(self, weights: np.ndarray) -> None:
        """Sets the weights of the bands [S] for the search of candidates."""
        self.get_buffer("search_weights").copy_(torch.from_numpy(weights))

    def forward(self, batch: Batch) -> Targets:
        """The outputs for the loss. In training mode, with dropout, noise and hidden roles."""
        inputs = self._inputs(batch)
        candidates = self._candidates(batch, inputs)

        def targets(member: Member, held_out: int | Tensor) -> tuple[Tensor, ...]:
            allowed = _allowed(candidates, held_out, batch)
            output = self._member_output(member, inputs, batch.present, allowed)
            if output.neighbourhood is None:
                return (output.target.float(),)
            return output.target.float(), self._log1p(output.neighbourhood.log_price).float()

        return Targets(*self.members.each(targets))

    def price(self, batch: Batch) -> Tensor:
        """[B] dollars, float64, within a factor of `MARGIN` of the training prices."""
        return self.explained(batch)["price"]

    def explained(self, batch: Batch) -> dict[str, Tensor]:
        """The predicted prices, and values that explain them.

        Returns:
            "price" [B]: dollars.
            Inner values of the networks, such as "gate" [B, E].
            With neighbours, "spread" [B]: standard deviation of their log prices.
            With neighbours, "comparable_rows" [B, n]: positions in the memory of those with the largest weights, in
            descending order, and "comparable_weights" [B, n]: their weights; 0 for rows without any embedding.
        """
        inputs = self._inputs(batch)
        candidates = self._candidates(batch, inputs)
        total = Mean(len(next(iter(batch.present.values()))))
        for number, held_out in enumerate(self.members.held_out):
            rows = None if batch.folds is None else torch.nonzero(batch.folds == held_out).squeeze(1)
            if rows is None or len(rows):
                some = _of_rows(rows, inputs, batch.present, _allowed(candidates, held_out, batch))
                total.add(rows, self.members.one(number, partial(self._explained, some)))
        found = total.means()
        found["price"] = self._within(torch.exp(found.pop("log_price")))
        if candidates is not None:
            weights, positions = found.pop("weights").topk(min(self.n_comparables, candidates.rows.shape[1]), dim=1)
            # Rows without any embedding get the median price, so no neighbour contributes to it.
            known = torch.stack(list(batch.present.values())).any(0)
            weights = weights * known.unsqueeze(1)
            found |= {"comparable_rows": candidates.rows.gather(1, positions), "comparable_weights": weights}
        return found

    def keys(self, scores: Inputs) -> Tensor:
        """[B, C] float16 search keys: the unit vector of each role's components, or zeros if the role is missing.

        Args:
            scores: role to [B, P_role] principal components.
        """
        return torch.cat([F.normalize(values, dim=1) for values in scores.values()], dim=1).half()

    def _inputs(self, batch: Batch) -> Inputs:
        return batch.inputs if batch.is_projected else self.inputs(batch.inputs, batch.present)

    def _candidates(self, batch: Batch, inputs: Inputs) -> Candidates | None:
        if not self.options.neighbours or batch.candidates is not None:
            return batch.candidates
        assert self.memory is not None, "a model with neighbours needs a memory"
        queries = self.keys(inputs)
        weights = self.get_buffer("search_weights")
        return self.memory.search(queries, weights, self.options.neighbours, batch.groups)

    def _member_output(
        self, member: Member, inputs: Inputs, present: Inputs, candidates: Candidates | None
    ) -> MemberOutput:
        """The output of a member. In training mode, it hides roles, and adds noise and dropout to the inputs."""
        present = self._hidden(present)
        inputs = self._disturbed(inputs, present)
        neighbourhood: Neighbourhood | None = None
        if member.neighbours is not None and candidates is not None:
            neighbourhood = member.neighbours(candidates, candidates.usable, self._log_median())
            inputs = {**inputs, NEIGHBOURHOOD: neighbourhood.features}
            present = {**present, NEIGHBOURHOOD: neighbourhood.weights.detach().sum(-1) > 0}
        explain = None if self.training else getattr(member.network, "explained", None)
        output, choices = explain(inputs, present) if explain else (member.network(inputs, present), {})
        return MemberOutput(self._target(output, present, neighbourhood), neighbourhood, choices)

    def _explained(
        self, arguments: tuple[Inputs, Inputs, Candidates | None], member: Member, _: int | Tensor
    ) -> dict[str, Tensor]:
        output = self._member_output(member, *arguments)
        found = {"log_price": torch.log(self._to_price(output.target)), **output.choices}
        if output.neighbourhood is not None:
            found |= {"spread": output.neighbourhood.deviation, "weights": output.neighbourhood.weights.float()}
        return found

    def _target(self, output: Tensor, present: Inputs, neighbourhood: Neighbourhood | None) -> Tensor:
        """[B] predicted log1p(price) from the network's output [B]; the median for rows without any embedding."""
        scaled = output.float() * self.get_buffer("target_scale")
        known = torch.stack([there for role, there in present.items() if role != NEIGHBOURHOOD]).any(0)
        if neighbourhood is not None:
            # Without the gradient of the correction: the kernel regression is trained by a loss of its own.
            start = torch.where(known, neighbourhood.log_price.detach(), self._log_median())
            return self._log1p(torch.where(known, start + scaled, start))
        output = scaled + self.get_buffer("target_median")
        return self._in_dollars(torch.where(known, output, self.get_buffer("target_median")))

    def _log_median(self) -> Tensor:
        """[] log of the median price in dollars, from the median target, log1p(price / unit)."""
        median = self.get_buffer("target_median").double()
        return (torch.expm1(median) * self.get_buffer("price_unit")).log().float()

    def _log1p(self, log_price: Tensor) -> Tensor:
        """log1p(price) from log prices: log1p(exp(x)) is the softplus of x."""
        return F.softplus(log_price)

    def _to_price(self, target: Tensor) -> Tensor:
        """Prices within the bounds, and finite, from any log1p(price); a NaN stays NaN."""
        return self._within(torch.expm1(target.double().clamp(max=LARGEST_LOG_PRICE)))

    def _within(self, price: Tensor) -> Tensor:
        return price.clamp(self.get_buffer("lowest_price"), self.get_buffer("highest_price"))

    def _in_dollars(self, output: Tensor) -> Tensor:
        """[B] log1p(price) from log1p(price / unit); along the tangents below 0 and above `LARGEST_OUTPUT`."""
        unit = self.get_buffer("price_unit").float()
        inner = output.clamp(0, LARGEST_OUTPUT)
        below, above = output.clamp(max=0), (output - LARGEST_OUTPUT).clamp(min=0)
        return torch.where(unit == 1, output, torch.log1p(unit * torch.expm1(inner)) + unit * below + above)

    def standardised(self, inputs: Inputs, present: Inputs) -> dict[str, Tensor]:
        """{role: [B, D_role]} standardised with the training rows' mean and deviation; zeros where missing."""
        scaled = {}
        for role, x in inputs.items():
            scaled[role] = torch.where(present[role].unsqueeze(-1), self.standardised_role(role, x), 0.0)
        return scaled

    def standardised_role(self, role: str, x: Tensor) -> Tensor:
        """[B, D_role] standardised values of a role that all rows have."""
        x = (x - self.get_buffer(f"mean_{role}")) * self.get_buffer(f"scale_{role}")
        return x.clamp(-LARGEST_INPUT, LARGEST_INPUT)

    def inputs(self, inputs: Inputs, present: Inputs) -> dict[str, Tensor]:
        """{role: [B, P_role]} inputs of networks and search keys: principal components, or standardised values."""
        scaled = self.standardised(inputs, present)
        if not self.options.components:
            return scaled
        return {role: x @ self.get_buffer(f"components_{role}") for role, x in scaled.items()}

    def _disturbed(self, inputs: Inputs, present: Inputs) -> Inputs:
        """Inputs with noise and dropout, and zeros for hidden roles; unchanged outside training mode."""
        noise, dropout = self.options.input_noise, self.options.input_dropout
        if not self.training:
            return inputs
        found = {}
        for role, x in inputs.items():
            noisy = x + noise * normal(x) if noise else x
            shown = present[role].unsqueeze(-1).to(x.dtype)
            if dropout:
                shown, noisy = shown * mask(x, dropout), noisy / (1 - dropout)
            found[role] = noisy * shown  # on a CPU three times as fast as `torch.where`
        return found

    def _hidden(self, present: Inputs) -> Inputs:
        if not self.training or self.options.modality_dropout == 0:
            return present
        stacked = torch.stack(list(present.values()), dim=1)
        shown = stacked & kept(stacked, self.options.modality_dropout)
        shown = torch.where(shown.any(1, keepdim=True), shown, stacked)  # never hide all roles of a row
        return dict(zip(present, shown.unbind(1), strict=True))


@dataclass(frozen=True)
class MemberOutput:
    """The output of a member for B rows.

    Attributes:
        target: [B] predicted log1p(price); float64 with neighbours.
        neighbourhood: result of the kernel regression; None without neighbours.
        choices: inner values of the network, such as the gate.
    """

    target: Tensor
    neighbourhood: Neighbourhood | None
    choices: dict[str, Tensor]


class Mean:
    """Accumulates the mean over members of their values for `n_rows` rows, if each member has values for some rows."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows, self.sums, self.counts = n_rows, dict[str, Tensor](), torch.zeros(n_rows)

    def add(self, rows: Tensor | None, values: Mapping[str, Tensor]) -> None:
        """Adds a member's values {name: [b, …]} for these rows [b], or for all rows if None."""
        device = next(iter(values.values())).device
        rows = torch.arange(self.n_rows, device=device) if rows is None else rows
        for name, value in values.items():
            total = self.sums.setdefault(name, value.new_zeros(self.n_rows, *value.shape[1:]))
            total.index_add_(0, rows, value)
        self.counts = self.counts.to(device).index_add(0, rows, torch.ones(len(rows), device=device))

    def means(self) -> dict[str, Tensor]:
        """The means {name: [n_rows, …]}."""
        return {
            name: total / self.counts.to(total).view(-1, *[1] * (total.dim() - 1)) for name, total in self.sums.items()
        }


def _allowed(candidates: Candidates | None, held_out: int | Tensor, batch: Batch) -> Candidates | None:
    """The candidates that the member may use: for rows of the split, all but those it holds out; for others, all."""
    if candidates is None or batch.folds is None:
        return candidates
    return replace(candidates, usable=candidates.usable & (candidates.folds != held_out))


def _of_rows(
    rows: Tensor | None, inputs: Inputs, present: Inputs, candidates: Candidates | None
) -> tuple[Inputs, Inputs, Candidates | None]:
    """The arguments for these rows [b] only, or for all rows if None."""
    if rows is None:
        return inputs, present, candidates
    some_inputs = {role: values[rows] for role, values in inputs.items()}
    some_present = {role: values[rows] for role, values in present.items()}
    return some_inputs, some_present, None if candidates is None else candidates.of(rows)


def _neighbours(bands: Tensor, options: Options) -> Neighbours | None:
    return Neighbours(int(bands.max()) + 1, options.neighbour_dropout) if options.neighbours else None


def _projected(dims: Mapping[str, int], options: Options) -> dict[str, int]:
    """Role to its number of principal components, or to its dimension without projection."""
    return {role: min(dim, options.components) or dim for role, dim in dims.items()}


def network_dims(dims: Mapping[str, int], options: Options) -> dict[str, int]:
    """Role to the dimension of a network's inputs, given the dimensions of the embeddings."""
    projected = _projected(dims, options)
    if not options.neighbours:
        return projected
    return {**projected, NEIGHBOURHOOD: N_FACTS + int(bands_of(projected).max()) + 1}


def _complete(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Completes the state dict of an earlier version, which had fixed bounds of prices and a single network."""
    for name in [name for name in state if name.startswith(f"{prefix}network.")]:
        state[f"{prefix}members.0.{name[len(prefix) :]}"] = state.pop(name)
    for name, value in EARLIER_BOUNDS.items():
        state.setdefault(f"{prefix}{name}", torch.tensor(value, dtype=torch.float64))


def _spread(targets: Tensor) -> Tensor:
    """The standard deviation of targets [N], or its estimate from the quartiles if a few extreme targets inflate it."""
    if len(targets) < 2:
        return torch.ones(())
    deviation, ordered = targets.std(), targets.sort().values  # torch.quantile refuses more than 16 million values
    # The quartiles of a normal distribution are 1.349 standard deviations apart.
    robust = (ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]) / 1.349
    is_inflated = (robust > 0) & (deviation > EXTREME_SPREAD * robust)
    # At least 1e-3, so that the network can still correct prices if all training prices are equal.
    return torch.where(is_inflated, robust, deviation).clamp_min(1e-3)
