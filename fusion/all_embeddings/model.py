"""Networks for two image and two text sources: attention with a mixture of experts, or plain concatenation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fusion.all_embeddings.config import Config
from fusion.nn.layers import Attention, Branch, ConcatNetwork, Inputs, MixtureOfExperts

IMAGES = ("clip_image", "siglip_image")
GATE_WIDTH = 128  # hidden features of the gate


class FusionNetwork(nn.Module):
    """Self-attention among image tokens and among text tokens, then cross-attention, and a mixture of experts.

    If each source has one token, those of a modality are merged by a linear map; several are averaged. Sources that are
    computed from a table count as text.
    """

    def __init__(self, config: Config, dims: Mapping[str, int]) -> None:
        super().__init__()
        width, dropout, self.n_tokens = config.width, config.dropout, config.n_tokens
        self.branches = nn.ModuleDict(
            {role: Branch(dim, width, config.n_tokens, dropout) for role, dim in dims.items()}
        )
        self.among_images = Attention(width, config.n_heads, dropout)
        self.among_texts = Attention(width, config.n_heads, dropout)
        self.image_to_text = Attention(width, config.n_heads, dropout)
        self.text_to_image = Attention(width, config.n_heads, dropout)
        if config.n_tokens == 1:
            self.merge_images = nn.Linear(len(IMAGES) * width, width)
            self.merge_texts = nn.Linear((len(dims) - len(IMAGES)) * width, width)
        self.mixture = MixtureOfExperts(2 * width, config.hidden, config.n_experts, GATE_WIDTH, dropout)

    def forward(self, inputs: Inputs, present: Inputs) -> Tensor:
        return self.explained(inputs, present)[0]

    def explained(self, inputs: Inputs, present: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The output [B], and {"gate": [B, E]}."""
        return self.mixture.explained(self._fused(inputs, present))

    def _fused(self, inputs: Inputs, present: Inputs) -> Tensor:
        images = self._tokens(IMAGES, inputs, present)
        texts = self._tokens([role for role in self.branches if role not in IMAGES], inputs, present)
        images, texts = self.among_images(images, images), self.among_texts(texts, texts)
        images, texts = self.image_to_text(images, texts), self.text_to_image(texts, images)
        if self.n_tokens == 1:
            return torch.cat([self.merge_images(images.flatten(1)), self.merge_texts(texts.flatten(1))], dim=1)
        return torch.cat([images.mean(1), texts.mean(1)], dim=1)

    def _tokens(self, roles: Iterable[str], inputs: Inputs, present: Inputs) -> Tensor:
        return torch.cat([self.branches[role](inputs[role], present[role]) for role in roles], dim=1)


def build_network(config: Config, dims: Mapping[str, int]) -> nn.Module:
    """The network that `--model` selects."""
    if config.model == "concat":
        return ConcatNetwork(dims, config.width, config.hidden, config.dropout)
    return FusionNetwork(config, dims)
