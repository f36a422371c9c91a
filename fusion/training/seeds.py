"""Seeds: sets those of a process's random generators, and derives one per purpose from the run's seed."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seeds the random generators of Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*parts: object) -> int:
    """Returns a 32-bit seed that is a hash of the parts, such as the run's seed, a purpose and a step.

    Different parts give independent seeds, except for collisions, of which the chance is 1 in 4 billion per pair.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")
