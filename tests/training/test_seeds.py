"""set_seed makes what is drawn the same."""

from __future__ import annotations

import random

import numpy as np
import torch

from fusion.utils import (
    set_seed,
)


def test_set_seed_seeds_all_generators() -> None:
    def draw() -> tuple[float, float, float]:
        set_seed(7)
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    assert draw() == draw()
