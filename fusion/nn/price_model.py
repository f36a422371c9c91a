"""`PriceModel`: a variant's network between standardised inputs and a price, with all that prediction needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.nn.batch import Batch
from fusion.nn.layers import Inputs, normal, uniform
from fusion.nn.neighbours import FIRST_WEIGHT, N_FACTS, Candidates, Memory, Neighbourhood, Neighbours, bands_of

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
NEIGHBOURHOOD = "neighbourhood"  # the role that networks get beside those of the embeddings
N_COMPARABLES = 5  # neighbours that a prediction names


@dataclass(frozen=True)
class Options:
    """What a model is made of beside its networks; the defaults are one network on all there is, without neighbours.

    Attributes:
        held_out: for each member, the part of the split that it does not train on.
        components: principal components of each role; 0: its values as they are.
        neighbours: candidates that a row is compared with; 0: none.
        neighbour_dropout, input_dropout, modality_dropout: shares hidden in training.
        input_noise: deviation of the noise added in training, where inputs have a deviation of 1.
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
    """What is trained on, of B rows and M members.

    Attributes:
        price: [B, M] log1p(price).
        neighbours: [B, M] the same from the neighbours alone; None: there are none.
    """

    price: Tensor
    neighbours: Tensor | None


class Member(nn.Module):
    """One network, and what it knows of neighbours.

    Args:
        held_out: the part of the split that it does not train on, and whose rows it never leans on.
    """

    def __init__(self, network: nn.Module, neighbours: Neighbours | None, held_out: int) -> None:
        super().__init__()
        self.network, self.neighbours, self.held_out = network, neighbours, held_out


class PriceModel(nn.Module):
    """A variant's networks between embeddings and a price, with everything that prediction needs in its state.

    Inputs are standardised with the training rows' mean and deviation; columns that are constant but for rounding
    count for nothing. A row without any embedding gets the median of the training prices. In training, sources are
    hidden from rows at random, so that a missing one means something.

    Without neighbours, a network's output starts at the median. With them, each role is brought to its principal
    components, the price starts at the one that the row's neighbours give, and a network corrects it: it gets what
    there is to say of the neighbourhood as one more role, `neighbourhood`.

    Members train side by side and do not see one another. A row of the split is priced by those that hold out its
    part, any other row by all of them: the mean of their log prices.

    Args:
        networks: one for each member, `forward({role: [B, D_role]}, {role: [B] bool}) -> [B]`, and optionally
            `explained(same) -> ([B], {name: [B, …]})`, which also tells of its inner choices.
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
        self.members = nn.ModuleList(
            Member(network, _neighbours(bands, options), held_out)
            for network, held_out in zip(networks, options.held_out, strict=True)
        )
        self.memory: Memory | None = None
        self.n_comparables = N_COMPARABLES
        self.named_rows = pd.Series(dtype=float)  # prices of the memory's rows in dollars, by sample id
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

    def set_components(self, components: Mapping[str, np.ndarray]) -> None:
        """Sets {role: [D, P]}, with which standardised values get a mean square of 1."""
        for role, values in components.items():
            self.get_buffer(f"components_{role}").copy_(torch.from_numpy(values))

    def components(self) -> dict[str, Tensor]:
        """{role: [D, P]}."""
        return {role: self.get_buffer(f"components_{role}") for role in self.dims}

    def set_search_weights(self, weights: np.ndarray) -> None:
        """Sets the weights of the bands [S] by which candidates are found."""
        self.get_buffer("search_weights").copy_(torch.from_numpy(weights))

    def forward(self, batch: Batch) -> Targets:
        """What to train on; in training, with everything hidden and added that is."""
        seen, candidates = self.inputs(batch.inputs, batch.present), self._candidates(batch)
        answers = [
            self._answer(member, seen, batch.present, _allowed(candidates, member, batch)) for member in self._all()
        ]
        price = torch.stack([answer.target for answer in answers], dim=1).float()
        known = [self._log1p(answer.around.log_price) for answer in answers if answer.around is not None]
        return Targets(price, torch.stack(known, dim=1).float() if known else None)

    def price(self, batch: Batch) -> Tensor:
        """[B] dollars, float64, within a factor of `MARGIN` of the training prices."""
        return self.explained(batch)["price"]

    def explained(self, batch: Batch) -> dict[str, Tensor]:
        """ "price" [B] in dollars, and why: the networks' inner choices, such as "gate" [B, E], and of neighbours

        "spread" [B], the deviation of their log prices, "comparable_rows" [B, n] in the memory, the weightiest first,
        and "comparable_weights" [B, n], zeros for rows without any embedding.
        """
        seen, candidates = self.inputs(batch.inputs, batch.present), self._candidates(batch)
        total = Mean(len(next(iter(batch.present.values()))))
        for member in self._all():
            rows = None if batch.folds is None else torch.nonzero(batch.folds == member.held_out).squeeze(1)
            if rows is None or len(rows):
                total.add(
                    rows,
                    self._explained(member, *_of_rows(rows, seen, batch.present, _allowed(candidates, member, batch))),
                )
        found = total.means()
        found["price"] = self._within(torch.exp(found.pop("log_price")))
        if candidates is not None:
            weights, places = found.pop("weights").topk(min(self.n_comparables, candidates.rows.shape[1]), dim=1)
            known = torch.stack(list(batch.present.values())).any(0)  # the others get the median, whatever is found
            weights = weights * known.unsqueeze(1)
            found |= {"comparable_rows": candidates.rows.gather(1, places), "comparable_weights": weights}
        return found

    def keys(self, scores: Inputs) -> Tensor:
        """[B, C] float16 of scores {role: [B, P_role]}: unit vectors, zeros where a role is missing."""
        return torch.cat([F.normalize(values, dim=1) for values in scores.values()], dim=1).half()

    def _all(self) -> Iterator[Member]:
        return cast(Iterator[Member], iter(self.members))

    def _candidates(self, batch: Batch) -> Candidates | None:
        if not self.options.neighbours or batch.candidates is not None:
            return batch.candidates
        assert self.memory is not None, "a model that leans on neighbours has a memory"
        queries = self.keys(self.inputs(batch.inputs, batch.present))
        weights = self.get_buffer("search_weights")
        return self.memory.search(queries, weights, self.options.neighbours, batch.groups)

    def _answer(self, member: Member, seen: Inputs, present: Inputs, candidates: Candidates | None) -> Answer:
        """A member's price, from inputs as they are; the rest is hidden from it in training."""
        present = self._hidden(present)
        inputs = self._disturbed(seen, present)
        around: Neighbourhood | None = None
        if member.neighbours is not None and candidates is not None:
            around = member.neighbours(candidates, candidates.usable, self._log_median())
            inputs = {**inputs, NEIGHBOURHOOD: around.features}
            present = {**present, NEIGHBOURHOOD: around.weights.detach().sum(-1) > 0}
        explain = None if self.training else getattr(member.network, "explained", None)
        output, choices = explain(inputs, present) if explain else (member.network(inputs, present), {})
        return Answer(self._target(output, present, around), around, choices)

    def _explained(
        self, member: Member, seen: Inputs, present: Inputs, candidates: Candidates | None
    ) -> dict[str, Tensor]:
        answer = self._answer(member, seen, present, candidates)
        found = {"log_price": torch.log(self._to_price(answer.target)), **answer.choices}
        if answer.around is not None:
            found |= {"spread": answer.around.deviation, "weights": answer.around.weights.float()}
        return found

    def _target(self, output: Tensor, present: Inputs, around: Neighbourhood | None) -> Tensor:
        scaled = output.float() * self.get_buffer("target_scale")
        known = torch.stack([there for role, there in present.items() if role != NEIGHBOURHOOD]).any(0)
        if around is not None:
            start = torch.where(known, around.log_price.detach(), self._log_median())
            return self._log1p(torch.where(known, start + scaled, start))
        output = scaled + self.get_buffer("target_median")
        return self._in_dollars(torch.where(known, output, self.get_buffer("target_median")))

    def _log_median(self) -> Tensor:
        """[] log of the median price, from the target that it is measured as."""
        median = self.get_buffer("target_median").double()
        return (torch.expm1(median) * self.get_buffer("price_unit")).log().float()

    def _log1p(self, log_price: Tensor) -> Tensor:
        """log1p(price) of log prices."""
        return F.softplus(log_price)

    def _to_price(self, target: Tensor) -> Tensor:
        """Finite and within the bounds, from any log1p(price); a NaN stays one."""
        return self._within(torch.expm1(target.double().clamp(max=LARGEST_LOG_PRICE)))

    def _within(self, price: Tensor) -> Tensor:
        return price.clamp(self.get_buffer("lowest_price"), self.get_buffer("highest_price"))

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
            scaled[role] = torch.where(present[role].unsqueeze(-1), self.standardised_role(role, x), 0.0)
        return scaled

    def standardised_role(self, role: str, x: Tensor) -> Tensor:
        """[B, D_role] in deviations of the training rows, of a role that all rows have."""
        x = (x - self.get_buffer(f"mean_{role}")) * self.get_buffer(f"scale_{role}")
        return x.clamp(-LARGEST_INPUT, LARGEST_INPUT)

    def inputs(self, inputs: Inputs, present: Inputs) -> dict[str, Tensor]:
        """{role: [B, P_role]} what networks and keys are made of: principal components, where there are any."""
        scaled = self.standardised(inputs, present)
        if not self.options.components:
            return scaled
        return {role: x @ self.get_buffer(f"components_{role}") for role, x in scaled.items()}

    def _disturbed(self, inputs: Inputs, present: Inputs) -> Inputs:
        """Inputs with what training adds and drops; zeros where a role is hidden."""
        noise, dropout = self.options.input_noise, self.options.input_dropout
        if not self.training:
            return inputs
        found = {}
        for role, x in inputs.items():
            noisy = x + noise * normal(x) if noise else x
            kept = noisy * (uniform(x) >= dropout) / (1 - dropout) if dropout else noisy
            found[role] = torch.where(present[role].unsqueeze(-1), kept, 0.0)
        return found

    def _hidden(self, present: Inputs) -> Inputs:
        if not self.training or self.options.modality_dropout == 0:
            return present
        stacked = torch.stack(list(present.values()), dim=1)
        kept = stacked & (uniform(stacked) >= self.options.modality_dropout)
        kept = torch.where(kept.any(1, keepdim=True), kept, stacked)  # never hide all there is
        return dict(zip(present, kept.unbind(1), strict=True))


@dataclass(frozen=True)
class Answer:
    """What a member says of B rows.

    Attributes:
        target: [B] log1p(price), float64 with neighbours.
        around: None without neighbours.
        choices: the network's inner ones.
    """

    target: Tensor
    around: Neighbourhood | None
    choices: dict[str, Tensor]


class Mean:
    """Means over members of what some of them say of some of `n_rows` rows."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows, self.sums, self.counts = n_rows, dict[str, Tensor](), torch.zeros(n_rows)

    def add(self, rows: Tensor | None, values: Mapping[str, Tensor]) -> None:
        """Adds {name: [b, …]} of these rows [b], or of all."""
        device = next(iter(values.values())).device
        rows = torch.arange(self.n_rows, device=device) if rows is None else rows
        for name, value in values.items():
            total = self.sums.setdefault(name, value.new_zeros(self.n_rows, *value.shape[1:]))
            total.index_add_(0, rows, value)
        self.counts = self.counts.to(device).index_add(0, rows, torch.ones(len(rows), device=device))

    def means(self) -> dict[str, Tensor]:
        """{name: [n_rows, …]}."""
        return {
            name: total / self.counts.to(total).view(-1, *[1] * (total.dim() - 1)) for name, total in self.sums.items()
        }


def _allowed(candidates: Candidates | None, member: Member, batch: Batch) -> Candidates | None:
    """The candidates that the member may lean on: for rows of the split none that it holds out, for others all."""
    if candidates is None or batch.folds is None:
        return candidates
    return replace(candidates, usable=candidates.usable & (candidates.folds != member.held_out))


def _of_rows(
    rows: Tensor | None, seen: Inputs, present: Inputs, candidates: Candidates | None
) -> tuple[Inputs, Inputs, Candidates | None]:
    if rows is None:
        return seen, present, candidates
    some_seen, some_present = ({role: one[rows] for role, one in part.items()} for part in (seen, present))
    return some_seen, some_present, None if candidates is None else candidates.of(rows)


def _neighbours(bands: Tensor, options: Options) -> Neighbours | None:
    return Neighbours(int(bands.max()) + 1, options.neighbour_dropout) if options.neighbours else None


def _projected(dims: Mapping[str, int], options: Options) -> dict[str, int]:
    """Role to the number of its principal components, or of its values as they are."""
    return {role: min(dim, options.components) or dim for role, dim in dims.items()}


def network_dims(dims: Mapping[str, int], options: Options) -> dict[str, int]:
    """Role to dimension of what a network gets, from those of the embeddings."""
    projected = _projected(dims, options)
    if not options.neighbours:
        return projected
    return {**projected, NEIGHBOURHOOD: N_FACTS + int(bands_of(projected).max()) + 1}


def _complete(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Models of earlier versions had fixed bounds, and one network."""
    for name in [name for name in state if name.startswith(f"{prefix}network.")]:
        state[f"{prefix}members.0.{name[len(prefix) :]}"] = state.pop(name)
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
