"""Networks for one image and one text source: cross-attention with a mixture of experts, or plain concatenation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.nn.layers import Attention, Branch, ConcatNetwork, Inputs, MixtureOfExperts
from fusion.qwen_clip.config import Config

IMAGE = "clip_image"
GATE_WIDTH = 512  # hidden features of the gate


class FusionNetwork(nn.Module):
    """Cross-attention between image and text tokens, several per source, and a mixture of experts.

    Sources that are computed from a table count as text.
    """

    def __init__(self, config: Config, dims: Mapping[str, int]) -> None:
        super().__init__()
        width, dropout = config.width, config.dropout
        self.branches = nn.ModuleDict(
            {role: Branch(dim, width, config.n_tokens, dropout) for role, dim in dims.items()}
        )
        self.image_to_text = Attention(width, config.n_heads, dropout)
        self.text_to_image = Attention(width, config.n_heads, dropout)
        self.mixture = MixtureOfExperts(2 * width, config.hidden, config.n_experts, GATE_WIDTH, dropout)

    def forward(self, inputs: Inputs, present: Inputs) -> Tensor:
        return self.explained(inputs, present)[0]

    def explained(self, inputs: Inputs, present: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The output [B], and {"gate": [B, E]}."""
        return self.mixture.explained(self._fused(inputs, present))

    def _fused(self, inputs: Inputs, present: Inputs) -> Tensor:
        tokens = {role: branch(inputs[role], present[role]) for role, branch in self.branches.items()}
        image = tokens.pop(IMAGE)
        text = torch.cat(list(tokens.values()), dim=1)
        attended = self.image_to_text(image, text), self.text_to_image(text, image)
        return torch.cat([tokens.mean(1) for tokens in attended], dim=1)


def build_network(config: Config, dims: Mapping[str, int]) -> nn.Module:
    """The network that `--model` selects."""
    if config.model == "concat":
        return ConcatNetwork(dims, config.width, config.hidden, config.dropout)
    return FusionNetwork(config, dims)
