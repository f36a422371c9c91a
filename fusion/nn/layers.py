"""The building blocks of the networks.

B is the number of rows, D the dimension of a source, W the width, T the number of tokens per source, E the number of
experts. No block mixes rows: there is no batch normalisation, and attention is among the tokens of one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.nn.draws import mask

Inputs = Mapping[str, Tensor]


class RowDropout(nn.Module):
    """Dropout whose mask of a row does not depend on the number of ranks (see `fusion.nn.draws`)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        # A scaled mask takes one pass over x, and another one over its gradient.
        return x * (mask(x, self.p) / (1 - self.p))


class Branch(nn.Module):
    """Maps a source's vector to T tokens.

    The vector goes through projection, norm, GELU and dropout. Each token is the sum of the result and a linear map of
    it, one per token. Rows without the source get learned tokens instead.

    Shape:
        x [B, D], present [B] bool -> [B, T, W]
    """

    def __init__(self, dim: int, width: int, n_tokens: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width), nn.GELU(), RowDropout(dropout))
        self.views = nn.Linear(width, n_tokens * width)
        self.norm = nn.LayerNorm(width)
        self.absent = nn.Parameter(torch.randn(n_tokens, width) * 0.02)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        hidden = self.project(x)
        tokens = self.norm(hidden.unsqueeze(1) + self.views(hidden).view(len(x), *self.absent.shape))
        return torch.where(present.view(-1, 1, 1), tokens, self.absent.to(tokens.dtype))


class Attention(nn.Module):
    """Pre-norm multi-head attention of tokens to the tokens of a context, with a residual connection.

    Shape:
        x [B, N, W], context [B, M, W] -> [B, N, W]
    """

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_x, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.dropout = RowDropout(dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self._heads(x, context)
        # With so few tokens bfloat16 is not faster here, and on a GPU vmap cannot differentiate the softmax of it.
        with torch.autocast(x.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        mixed = mixed.transpose(1, 2).flatten(2)
        seen: Tensor = self.dropout(self.out(mixed))
        return x + seen

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, heads, N, M] attention weights of each token over the tokens of the context; they sum to 1 over M."""
        query, key, _ = self._heads(x, context)
        weights: Tensor = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        return weights

    def _heads(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.key_value(self.norm_context(context)).chunk(2, dim=-1)
        split = [part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (key, value)]
        return self.query(self.norm_x(x)).unflatten(-1, (self.n_heads, -1)).transpose(1, 2), split[0], split[1]


class Experts(nn.Module):
    """E networks of the same shape with one output each, computed together as batched matrix products.

    Shape:
        x [B, I] -> [B, E]
    """

    def __init__(self, dim: int, hidden: tuple[int, ...], n_experts: int, dropout: float) -> None:
        super().__init__()
        sizes = (dim, *hidden)
        self.layers = nn.ModuleList(_ExpertLinear(n_experts, i, o) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in hidden)
        self.last = _ExpertLinear(n_experts, sizes[-1], 1)
        self.dropout = RowDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.expand(self.last.weight.shape[0], -1, -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            active = F.gelu(norm(layer(hidden)))
            hidden = self.dropout(active.transpose(0, 1)).transpose(0, 1)  # which draws masks row by row
        outputs: Tensor = self.last(hidden)
        return outputs.squeeze(-1).T


class _ExpertLinear(nn.Module):
    """One linear map per expert: [E, B, I] -> [E, B, O]. With experts first, batched products need no copies."""

    def __init__(self, n_experts: int, dim_in: int, dim_out: int) -> None:
        super().__init__()
        bound = dim_in**-0.5
        self.weight = nn.Parameter(torch.empty(n_experts, dim_in, dim_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_experts, 1, dim_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        # DDP warns and copies if the gradient of a parameter has other strides than the parameter. For a batch of one
        # row, autograd would pass the gradient of the bias through with the strides of the output; this view avoids it.
        bias = self.bias.flatten(1).unsqueeze(1)
        return torch.baddbmm(bias, x, self.weight)


class MixtureOfExperts(nn.Module):
    """Mean of the experts' outputs, weighted by a gate on the input (Jacobs et al. 1991). All experts are computed.

    Shape:
        x [B, I] -> [B]
    """

    def __init__(self, dim: int, hidden: tuple[int, ...], n_experts: int, gate_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate_network = nn.Sequential(nn.Linear(dim, gate_width), nn.GELU(), nn.Linear(gate_width, n_experts))
        self.experts = Experts(dim, hidden, n_experts, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.explained(x)[0]

    def explained(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The output [B], and {"gate": [B, E]}, the weights of the experts; they sum to 1 over E."""
        x = self.norm(x)
        gate: Tensor = self.gate_network(x).softmax(-1)
        return (gate * self.experts(x)).sum(-1), {"gate": gate}


class ConcatNetwork(nn.Module):
    """The network of `--model concat`: one token per source, concatenated and passed to a multilayer perceptron.

    Shape:
        {role: [B, D_role]}, {role: [B] bool} -> [B]
    """

    def __init__(self, dims: Mapping[str, int], width: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({role: Branch(dim, width, 1, dropout) for role, dim in dims.items()})
        self.head = Experts(width * len(dims), hidden, 1, dropout)

    def forward(self, inputs: Inputs, present: Inputs) -> Tensor:
        tokens = [branch(inputs[role], present[role]).squeeze(1) for role, branch in self.branches.items()]
        outputs: Tensor = self.head(torch.cat(tokens, dim=1))
        return outputs.squeeze(-1)
