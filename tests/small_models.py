"""Makes small models of the variants, with and without neighbours, and random inputs for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion.all_embeddings.config import Config as AllConfig
from fusion.all_embeddings.model import build_network as build_all
from fusion.nn.batch import Batch
from fusion.nn.neighbours import Memory, bands_of
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import make_model
from fusion.qwen_clip.config import Config as PairConfig
from fusion.qwen_clip.model import build_network as build_pair

ROLES = {"clip_image": 9, "siglip_image": 10, "siglip_text": 11, "qwen_text": 12}
N_REMEMBERED = 40
SHAPE = {"width": 16, "n_heads": 2, "hidden": (12, 8), "dropout": 0.25}
PUBLISHED = {"recipe": "published"}
BEST = {"components": 6, "neighbours": 7}


def build(variant: str, model: str, **settings: Any) -> PriceModel:
    """A model with its initial weights; one that uses neighbours has a memory of `N_REMEMBERED` rows."""
    config_class, build_network = (AllConfig, build_all) if variant == "all" else (PairConfig, build_pair)
    config: Any = config_class(**{"model": model, **SHAPE, **settings})
    dims = {role: ROLES[role] for role in config.bindings()}
    torch.manual_seed(0)
    made = make_model(config, build_network, dims)
    made.calibrate({}, torch.log1p(torch.tensor([5.0, 20.0, 400.0])))
    if config.components:
        made.set_components(components_for(dims, config.components))
    if config.neighbours:
        made.memory = memory_for(made)
    return made


def components_for(dims: dict[str, int], n_components: int) -> dict[str, np.ndarray]:
    """Random components {role: [D, P]} with orthonormal columns."""
    generator = torch.Generator().manual_seed(2)
    squares = {role: torch.randn(dim, dim, generator=generator) for role, dim in dims.items()}
    return {role: torch.linalg.qr(square)[0][:, :n_components].numpy() for role, square in squares.items()}


def memory_for(model: PriceModel, n_rows: int = N_REMEMBERED) -> Memory:
    """A memory of random rows in three folds, with every row in a group of its own."""
    batch = batch_for(model, n_rows, missing=0.1, seed=3)
    keys = model.keys(model.inputs(batch.inputs, batch.present))
    log_prices = 3 + torch.randn(n_rows, generator=torch.Generator().manual_seed(4))
    folds, groups = torch.arange(n_rows) % 3, torch.arange(n_rows)
    bands = bands_of({role: values.shape[1] for role, values in model.components().items()})
    return Memory(keys, log_prices, folds, groups, bands)


def batch_for(model: PriceModel, n: int = 32, missing: float = 0.3, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = {role: torch.randn(n, dim, generator=generator) for role, dim in model.dims.items()}
    present = {role: torch.rand(n, generator=generator) >= missing for role in model.dims}
    return Batch(inputs, present)


def some_without_neighbours(model: PriceModel, batch: Batch) -> Batch:
    """The same batch with no usable neighbours for the first four rows."""
    found = model._candidates(batch, model._inputs(batch))
    if found is None:
        return batch
    usable = found.usable.clone()
    usable[:4] = False
    return replace(batch, candidates=replace(found, usable=usable))


def take(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch that has only inputs and presence."""
    parts = ({role: one[rows] for role, one in part.items()} for part in (batch.inputs, batch.present))
    return Batch(*parts)


def target(model: PriceModel, batch: Batch) -> Tensor:
    """The predicted log1p(price) [B] of a model with one member."""
    return model(batch).price.squeeze(1)
