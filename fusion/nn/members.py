"""`Members`: the members of an ensemble, which are trained side by side and computed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusion.nn.draws import random_member
from fusion.nn.neighbours import Neighbours


class Member(nn.Module):
    """A member of the ensemble: a network, and its kernel regression on neighbours, if any."""

    def __init__(self, network: nn.Module, neighbours: Neighbours | None) -> None:
        super().__init__()
        self.network, self.neighbours = network, neighbours


Compute = Callable[[Member, int | Tensor], Any]  # of a member and the part of the split that it holds out


class Members(nn.Module):
    """M members of the same structure. Each parameter of M > 1 members is one tensor [M, …].

    So the members are computed with batched matrix products, and the optimizer has as many tensors as for one member.
    The state dict is that of a list of the members: its names start with the number of a member. Networks have to be
    made of operations that `torch.func.vmap` can batch: they must not branch on values of tensors, or call `item`.

    Args:
        held_out: for each member, the part of the split that it does not train on, and from which it never takes
            neighbours.
    """

    def __init__(self, members: Sequence[Member], held_out: Sequence[int]) -> None:
        super().__init__()
        self.member, self.held_out = members[0], tuple(held_out)
        if len(self) > 1:
            _stack(members)
        self.register_buffer("parts", torch.tensor(self.held_out), persistent=False)
        self.register_state_dict_post_hook(_split_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_stack_state)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.held_out)

    def forward(self, compute: Compute, held_out: int | Tensor) -> Any:
        """What `compute` returns for the member whose weights this module has; see `each` and `one`."""
        return compute(self.member, held_out)

    def each(self, compute: Callable[[Member, int | Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        """The tensors [B] that `compute` returns for each member, as tensors [B, M]."""
        if len(self) == 1:
            return [value.unsqueeze(1) for value in compute(self.member, self.held_out[0])]

        def member(weights: Mapping[str, Tensor], held_out: Tensor, number: Tensor) -> Any:
            with random_member(number, len(self)):
                return functional_call(self, dict(weights), (compute, held_out))

        parts = self.get_buffer("parts")
        numbers = torch.arange(len(self), device=parts.device)
        # Of the kernels for attention on a CPU, only this one is made of products that vmap can batch.
        with sdpa_kernel(SDPBackend.MATH):
            return list(vmap(member, out_dims=1, randomness="same")(self._weights(), parts, numbers))

    def one(self, number: int, compute: Compute) -> Any:
        """What `compute` returns for the member with this number."""
        if len(self) == 1:
            return compute(self.member, self.held_out[0])
        weights = {name: value[number] for name, value in self._weights().items()}
        with random_member(torch.tensor(number, device=self.get_buffer("parts").device), len(self)):
            return functional_call(self, weights, (compute, self.held_out[number]))

    def clip_gradients(self, limit: float) -> None:
        """Scales the gradient of each member whose L2 norm is larger than the limit, so that its norm is the limit."""
        if len(self) == 1:
            nn.utils.clip_grad_norm_(self.parameters(), limit)
            return
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(one.flatten(1), dim=1) for one in gradients])
        factors = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1)
        for one in gradients:
            one.mul_(factors.view(-1, *[1] * (one.dim() - 1)))

    def _weights(self) -> dict[str, Tensor]:
        """The parameters and buffers [M, …] by name, as views whose gradients have the strides of the parameters.

        Autograd would pass other strides of axes of length 1 through; DistributedDataParallel warns of them and copies.
        """
        found = {**dict(self.member.named_parameters()), **dict(self.member.named_buffers())}
        return {f"member.{name}": value.flatten(1).view(value.shape) for name, value in found.items()}


def _stack(members: Sequence[Member]) -> None:
    """Replaces each parameter and buffer of the first member by a tensor [M, …] of those of all members."""
    first, made = members[0], dict[int, Tensor]()
    names = [name for name, _ in first.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in first.named_buffers(remove_duplicate=False)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        own = [getattr(member.get_submodule(parent), leaf) for member in members]
        stacked = torch.stack([value.detach() for value in own])
        if isinstance(own[0], nn.Parameter):
            stacked = nn.Parameter(stacked, own[0].requires_grad)
        setattr(first.get_submodule(parent), leaf, made.setdefault(id(own[0]), stacked))


def _split_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Gives each member its own entries in a state dict."""
    members, start = cast(Members, module), f"{prefix}member."
    own = {name[len(start) :]: state.pop(name) for name in list(state) if name.startswith(start)}
    for number in range(len(members)):
        for name, value in own.items():
            state[f"{prefix}{number}.{name}"] = value if len(members) == 1 else value[number]


def _stack_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Joins the members' own entries of a state dict; entries that a member lacks stay as they are."""
    members = cast(Members, module)
    for name in [name[len(f"{prefix}0.") :] for name in state if name.startswith(f"{prefix}0.")]:
        names = [f"{prefix}{number}.{name}" for number in range(len(members))]
        if all(one in state for one in names):
            values = [state.pop(one) for one in names]
            state[f"{prefix}member.{name}"] = values[0] if len(members) == 1 else torch.stack(values)
