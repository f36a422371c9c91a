"""The code that the published models were trained with, rewritten from its description, to compare speeds with.

`python -m benchmarks.published DATA [DEVICE]` trains two epochs on the rows that `benchmarks.larger_than_memory.make`
writes to the folder DATA, and prints the seconds of the second epoch and the MFLOP of a row's forward pass.

One token per source goes through attention between the two image sources, between the two text sources, and between
images and texts, in both directions; a gate mixes three experts. With a single token to attend to, attention is a
linear map. The loader copies one row after the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, random_split
from torch.utils.flop_counter import FlopCounterMode

from fusion.loss_functions import get_loss_function

WIDTH, N_HEADS, N_EXPERTS, DROPOUT = 512, 8, 3, 0.25
HIDDEN = (1024, 512, 256)
BATCH, LR, WEIGHT_DECAY, CLIP = 256, 1e-3, 1e-4, 1.0


class PublishedNetwork(nn.Module):
    def __init__(self, dims: Mapping[str, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                role: nn.Sequential(nn.Linear(dim, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(), nn.Dropout(DROPOUT))
                for role, dim in dims.items()
            }
        )
        attention = {name: _attention() for name in ("images", "texts", "image_to_text", "text_to_image")}
        self.attention = nn.ModuleDict(attention)
        self.merge = nn.ModuleDict({name: nn.Linear(2 * WIDTH, WIDTH) for name in ("images", "texts")})
        self.gate = nn.Sequential(nn.Linear(2 * WIDTH, 128), nn.ReLU(), nn.Linear(128, N_EXPERTS), nn.Softmax(-1))
        self.experts = nn.ModuleList(_expert() for _ in range(N_EXPERTS))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        tokens = [branch(inputs[role]).unsqueeze(1) for role, branch in self.branches.items()]
        images, texts = self._merged("images", *tokens[:2]), self._merged("texts", *tokens[2:])
        across = self.attention["image_to_text"](images, texts, texts)[0] + images
        back = self.attention["text_to_image"](texts, images, images)[0] + texts
        fused = torch.cat([across, back], dim=-1).squeeze(1)
        outputs = torch.cat([expert(fused) for expert in self.experts], dim=-1)
        return (self.gate(fused) * outputs).sum(-1)

    def _merged(self, kind: str, first: Tensor, second: Tensor) -> Tensor:
        attended = self.attention[kind](first, second, second)[0] + first
        merged: Tensor = self.merge[kind](torch.cat([attended, second], dim=-1))
        return merged


def _attention() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, N_HEADS, dropout=DROPOUT, batch_first=True)


def _expert() -> nn.Sequential:
    layers: list[nn.Module] = []
    for dim_in, dim_out in zip((2 * WIDTH, *HIDDEN), HIDDEN, strict=False):
        layers += [nn.Linear(dim_in, dim_out), nn.LayerNorm(dim_out), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, data: Path) -> None:
        prices = pd.read_csv(data / "train.csv")["price"].to_numpy()
        self.targets = torch.from_numpy(np.log1p(prices).astype(np.float32))
        self.sources = {file.stem: _vectors(file) for file in sorted((data / "embeddings" / "train").iterdir())}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[row] for name, values in self.sources.items()} | {"target": self.targets[row]}


def _vectors(file: Path) -> Tensor:
    column = pq.read_table(file).column("embedding").combine_chunks()
    return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1))


def _moved(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in batch.items()}


def main() -> None:
    rows, device = Rows(Path(sys.argv[1])), torch.device(*sys.argv[2:] or ["cpu"])
    train, validation = random_split(rows, [0.8, 0.2])
    loaders = DataLoader(train, BATCH, shuffle=True), DataLoader(validation, BATCH)
    model = PublishedNetwork({name: values.shape[1] for name, values in rows.sources.items()}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    loss = get_loss_function("weighted_smape").to(device)
    for _ in range(2):
        began = time.monotonic()
        model.train()
        for batch in map(partial(_moved, device), loaders[0]):
            optimizer.zero_grad()
            loss(model(batch), batch["target"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for batch in map(partial(_moved, device), loaders[1]):
                loss(model(batch), batch["target"]).item()
        seconds = time.monotonic() - began
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(_moved(device, batch))
    print(seconds, counter.get_total_flops() / len(batch["target"]) / 1e6)


if __name__ == "__main__":
    main()
