"""Random numbers of a training step, for dropout and noise, that do not depend on the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BITS = 16  # per random number: four come from one 64-bit word, which makes a mask three times as fast as `torch.rand`
PER_WORD = 64 // BITS
LEVELS = 2**BITS


class Words(Protocol):
    """A source of random 64-bit words."""

    def take(self, n: int) -> Tensor:
        """The words of this rank's rows, int64 [b, n], for `n` words per row."""


@dataclass
class CountedWords:
    """Words in CPU memory, from a generator that can skip those of other rows (PCG64; O'Neill, 2014).

    Attributes:
        rows: this rank's slice of the global batch of `n_rows` rows.
    """

    seed: int
    rows: slice
    n_rows: int
    generator: np.random.PCG64 = field(init=False)

    def __post_init__(self) -> None:
        self.generator = np.random.PCG64(self.seed)

    def take(self, n: int) -> Tensor:
        """See `Words`."""
        self.generator.advance(self.rows.start * n)
        words = self.generator.random_raw((self.rows.stop - self.rows.start) * n)
        self.generator.advance((self.n_rows - self.rows.stop) * n)
        return torch.from_numpy(words.view(np.int64)).view(-1, n)


@dataclass
class DrawnWords:
    """Words on any device. They are drawn for all rows of the global batch, and those of other rows are discarded.

    Attributes:
        generator: of the device; None: the device's default one.
        rows: this rank's slice of the global batch of `n_rows` rows.
    """

    generator: torch.Generator | None
    rows: slice
    n_rows: int
    device: torch.device

    def take(self, n: int) -> Tensor:
        """See `Words`."""
        words = torch.empty(self.n_rows, n, dtype=torch.int64, device=self.device)
        return words.random_(-(2**63), None, generator=self.generator)[self.rows]


_words: ContextVar[Words | None] = ContextVar("words", default=None)


@contextmanager
def random_rows(seed: int, rows: slice, n_rows: int, device: torch.device) -> Iterator[None]:
    """Inside the block, random numbers of a row depend on `seed` and its position in the global batch alone.

    So they do not depend on the number of ranks.

    Args:
        rows: this rank's slice of the global batch of `n_rows` rows.
    """
    if device.type == "cpu":
        words: Words = CountedWords(seed, rows, n_rows)
    else:
        words = DrawnWords(torch.Generator(device).manual_seed(seed), rows, n_rows, device)
    with words_from(words):
        yield


@contextmanager
def words_from(words: Words) -> Iterator[None]:
    """Inside the block, random numbers are made of these words."""
    token = _words.set(words)
    try:
        yield
    finally:
        _words.reset(token)


_member: ContextVar[tuple[Tensor, int] | None] = ContextVar("member", default=None)


@contextmanager
def random_member(number: Tensor, n_members: int) -> Iterator[None]:
    """Inside the block, random numbers are those of one member of an ensemble.

    They are drawn for all members at once, so that `torch.func.vmap` can compute the members together.

    Args:
        number: [] of the member, int64.
    """
    token = _member.set((number, n_members))
    try:
        yield
    finally:
        _member.reset(token)


def kept(like: Tensor, dropout: float) -> Tensor:
    """A bool mask with the shape of `like` [B, …], false with the probability `dropout`, to the nearest 2^-16."""
    return _of_member(_numbers(like) >= _threshold(dropout))


def mask(like: Tensor, dropout: float) -> Tensor:
    """As `kept`, but of zeros and ones of the type of `like`."""
    if like.is_cuda:
        return kept(like, dropout).to(like.dtype)
    # On a CPU, converting a mask of bools takes twice as long as the comparison itself.
    numbers = _numbers(like)
    return _of_member(torch.ge(numbers, _threshold(dropout), out=torch.empty(numbers.shape, dtype=like.dtype)))


def normal(like: Tensor) -> Tensor:
    """Normal random numbers, float32, with the shape of `like` [B, …]: the quantiles at 2^16 equidistant levels."""
    return _quantiles(like.device)[_of_member(_numbers(like)).int() + LEVELS // 2]


def _threshold(dropout: float) -> int:
    """The smallest random number of what is kept."""
    threshold: int = round(dropout * LEVELS) - LEVELS // 2
    return threshold


def _numbers(like: Tensor) -> Tensor:
    """Uniform int16 random numbers for `like` [B, …]: of its shape, or [B, M, …] for all members of an ensemble."""
    member, words = _member.get(), _words.get() or DrawnWords(None, slice(None), len(like), like.device)
    shape = like.shape[1:] if member is None else (member[1], *like.shape[1:])
    n = math.prod(shape)
    numbers: Tensor = words.take(-(-n // PER_WORD)).contiguous().view(torch.int16)[:, :n]
    return numbers.reshape(len(like), *shape)


def _of_member(values: Tensor) -> Tensor:
    """The values [B, …] of the member that is computed, from those of all members [B, M, …]."""
    member = _member.get()
    return values if member is None else values.movedim(1, 0)[member[0].view(1)].squeeze(0)


@cache
def _quantiles(device: torch.device) -> Tensor:
    levels = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    found: Tensor = torch.special.ndtri(levels)
    return found.float().to(device)
