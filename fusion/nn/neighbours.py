"""Kernel regression with a learned metric: finds the most similar labelled rows, and predicts a price from theirs.

The predicted log price of a row is the mean log price of its neighbours, weighted by a softmax over similarities
(Nadaraya, 1964; Watson, 1964). The key of a row is the concatenation over roles of the unit vector of its principal
components. The components of a role are divided into bands, and each band has a learned weight in the similarity: the
components with little variance distinguish products, but hardly affect a plain cosine.

B is the number of query rows, N of rows in the memory, K of candidates per query, C of columns of a key, S of bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.nn.approximate import Index, Partition
from fusion.nn.draws import kept

BAND_EDGES = (
    8,
    32,
    96,
    192,
)  # components at which a new band of a role starts; the last band contains all further ones
FIRST_WEIGHT = 6.0  # initial weight of every band
PAIR_WIDTH = 8  # hidden features of the small network that corrects the similarity of a pair of rows
# Similarities are in [-1, 1]. They are multiplied by the first of these before that network, and its output by the
# second, so that the network's inputs and outputs have the scale for which linear layers are initialised.
SIMILARITY_SCALE = 4.0
CORRECTION_SCALE = 10.0
N_FACTS = 4  # features of a neighbourhood beside its mean similarity in each band
PART_COLUMNS = 64  # columns per part in `largest`
# Queries whose candidates' keys are compared at a time. On a CPU, these are about a million numbers, which fit in its
# cache and in memory that is already allocated; with 64 queries it takes five times as long. On a GPU, it is enough to
# keep it busy.
GATHERED_ROWS = {"cpu": 8, "cuda": 256}
BLOCK_ROWS = 2**20  # rows that are compared with a chunk of queries at a time; 4 GiB of float32 for 1,024 queries
# The index returns so many times the wanted candidates. Of these, the best by exact similarity are kept, without rows
# of the query's own group.
FOUND_PER_KEPT = 2


def bands_of(dims: Mapping[str, int]) -> Tensor:
    """[C] int64: the band of each column of a key, for roles with these numbers of components.

    >>> bands_of({"a": 10, "b": 3}).tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    """
    sizes = []
    for dim in dims.values():
        edges = [0, *(edge for edge in BAND_EDGES if edge < dim), dim]
        sizes += [end - start for start, end in pairwise(edges)]
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def band_weights(change: Tensor) -> Tensor:
    """[S] float64 weights of the bands, from the learned parameter [S], which is 0 before training.

    The parameter is a change relative to `FIRST_WEIGHT`, because float32 resolves small changes near 0 more finely than
    near the weight itself.
    """
    return F.softplus(math.log(math.expm1(FIRST_WEIGHT)) + change.double())


@dataclass(frozen=True)
class Candidates:
    """The rows of a memory that are most similar to each of B query rows.

    Attributes:
        rows: [B, K] int64 positions in the memory.
        similarities: [B, K, S] contribution of each band to the cosine similarities.
        log_prices: [B, K] float32 log prices of the candidates.
        folds: [B, K] part of the split that each candidate is in.
        usable: [B, K] bool; false for padding, if a row has fewer than K candidates.
    """

    rows: Tensor
    similarities: Tensor
    log_prices: Tensor
    folds: Tensor
    usable: Tensor

    def of(self, rows: Tensor) -> Candidates:
        """The candidates of some of the query rows [b]."""
        return Candidates(**{name: value[rows] for name, value in vars(self).items()})

    @staticmethod
    def joined(parts: Sequence[Candidates]) -> Candidates:
        """Concatenates the candidates of several sets of query rows."""
        return Candidates(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Candidates)))


@dataclass(frozen=True)
class Memory:
    """The labelled rows among which neighbours are searched.

    Attributes:
        keys: [N, C] float16.
        log_prices: [N] float32.
        folds: [N] int64 part of the split that each row is in; if negative, the row is never a neighbour.
        groups: [N] int64 group of near-duplicates of each row.
        bands: [C] int64 band of each column of the keys, from `bands_of`.
        partition: by which a CPU searches approximately; None: it searches exactly, as a GPU always does.
    """

    keys: Tensor
    log_prices: Tensor
    folds: Tensor
    groups: Tensor
    bands: Tensor
    partition: Partition | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Memory:
        """The memory on another device. On a GPU it has no partition, because there an exact search is faster."""
        moved = {name: getattr(self, name).to(device) for name in ("keys", "log_prices", "folds", "groups", "bands")}
        return Memory(**moved, partition=self.partition if device.type == "cpu" else None)

    def of(self, rows: Tensor) -> Memory:
        """A memory of some of the rows [n], without a partition."""
        return Memory(self.keys[rows], self.log_prices[rows], self.folds[rows], self.groups[rows], self.bands)

    def without(self, held_out: Sequence[int]) -> Memory:
        """The same memory without neighbours from the parts that all members hold out."""
        parts = set(held_out)
        if len(parts) > 1:
            return self
        return replace(self, folds=torch.where(self.folds == parts.pop(), -1, self.folds))

    def search(self, queries: Tensor, weights: Tensor, k: int, groups: Tensor | None = None) -> Candidates:
        """The k rows with the largest weighted similarity to each query.

        The search is exact except for rounding; with a `partition` it is approximate.

        Args:
            queries: [B, C] float16 keys.
            weights: [S] weights of the bands; with a partition, the same in every call.
            groups: [B] group of each query, whose rows must not be its neighbours; None if there is no such limit.
        """
        k = min(k, len(self))
        if self.partition is not None:
            return self._in_lists(self.partition, queries, weights, k, groups)
        return self._exactly(queries, weights, k, groups)

    def _exactly(self, queries: Tensor, weights: Tensor, k: int, groups: Tensor | None) -> Candidates:
        blocks = [
            self._largest(queries, weights, k, groups, slice(start, start + BLOCK_ROWS))
            for start in range(0, len(self), BLOCK_ROWS)
        ]
        found, rows = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
        if len(blocks) > 1:
            found, places = found.topk(k, dim=1)
            rows = rows.gather(1, places)
        return self.candidates(rows, self.similarities(queries, rows), torch.isfinite(found))

    def _largest(
        self, queries: Tensor, weights: Tensor, k: int, groups: Tensor | None, block: slice
    ) -> tuple[Tensor, Tensor]:
        """The k largest weighted similarities to rows of the block that may be neighbours, and their positions."""
        total = self._totals(queries, weights, block)
        total.masked_fill_(self.folds[block] < 0, -torch.inf)
        if groups is not None:
            total.masked_fill_(groups.unsqueeze(1) == self.groups[block], -torch.inf)
        found, rows = largest(total, min(k, total.shape[1]))
        return found, rows + block.start

    def _in_lists(
        self, partition: Partition, queries: Tensor, weights: Tensor, k: int, groups: Tensor | None
    ) -> Candidates:
        """As `_exactly`, but among the rows that an index finds. If it finds too few for a query, searches exactly."""
        rows = self._index(partition, weights).rows(queries, min(FOUND_PER_KEPT * k, len(self)))
        may_be = (rows >= 0) & (self.folds[rows] >= 0)  # -1 is padding; as an index it reads the last row, harmlessly
        if groups is not None:
            may_be &= groups.unsqueeze(1) != self.groups[rows]
        similarities = self.similarities(queries, rows.clamp(min=0))
        total = (similarities.float() @ weights.float()).masked_fill(~may_be, -torch.inf)
        found, places = total.topk(k, dim=1)
        bands = places.unsqueeze(2).expand(-1, -1, similarities.shape[2])
        usable, rows, similarities = torch.isfinite(found), rows.gather(1, places), similarities.gather(1, bands)
        few = torch.nonzero(~usable.all(1)).squeeze(1)
        if len(few):
            exact = self._exactly(queries[few], weights, k, None if groups is None else groups[few])
            usable[few], rows[few], similarities[few] = exact.usable, exact.rows, exact.similarities.half()
        return self.candidates(rows, similarities, usable)

    def _index(self, partition: Partition, weights: Tensor) -> Index:
        """The index of the rows that may be neighbours. It is built at the first search."""
        made: list[Index] = self.__dict__.setdefault("_indexes", [])
        if not made:
            rows = torch.nonzero(self.folds >= 0).squeeze(1)
            made.append(Index(partition, self.keys, rows, weights.double()[self.bands].sqrt()))
        return made[0]

    def candidates(self, rows: Tensor, similarities: Tensor, usable: Tensor) -> Candidates:
        """Candidates from the positions [B, K] of rows."""
        return Candidates(rows, similarities.float(), self.log_prices[rows], self.folds[rows], usable)

    def similarities(self, queries: Tensor, rows: Tensor) -> Tensor:
        """[B, K, S] float16 similarities of the queries [B, C] to the rows at these positions [B, K], by band."""
        device = self.keys.device.type
        kind, n_rows = torch.float16 if device == "cuda" else torch.float32, GATHERED_ROWS[device]
        which, parts = F.one_hot(self.bands).to(kind), []
        for some, positions in zip(torch.split(queries, n_rows), torch.split(rows, n_rows), strict=True):
            keys = self.keys.index_select(0, positions.reshape(-1)).view(*positions.shape, self.keys.shape[1])
            parts.append(torch.bmm(keys.to(kind), some.to(kind).unsqueeze(2) * which).half())
        return torch.cat(parts)

    def _totals(self, queries: Tensor, weights: Tensor, block: slice = slice(None)) -> Tensor:
        """[B, n] weighted similarities to a block of rows, in the precision in which this device is fastest."""
        weighted = queries.float() * weights.float()[self.bands]
        if self.keys.device.type == "cuda":
            return weighted.half() @ self.keys[block].T
        kind = torch.bfloat16 if _has_bf16_tiles() else torch.float32
        return weighted.to(kind) @ self._keys_as(kind)[block].T

    def _keys_as(self, kind: torch.dtype) -> Tensor:
        made: dict[torch.dtype, Tensor] = self.__dict__.setdefault("_converted", {})
        if kind not in made:
            made[kind] = self.keys.to(kind)
        return made[kind]


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row [B, N] in descending order, and their positions; much faster than `topk` alone.

    The columns are divided into parts. The k largest values lie in the k parts with the largest maxima, so `topk` only
    has to search these.
    """
    n_parts = values.shape[1] // PART_COLUMNS
    if n_parts < 4 * k:
        return values.topk(k, dim=1)
    end = n_parts * PART_COLUMNS
    parts = values[:, :end].view(len(values), n_parts, PART_COLUMNS)
    best = parts.amax(2).topk(k, dim=1).indices
    columns = (best.unsqueeze(2) * PART_COLUMNS + torch.arange(PART_COLUMNS, device=values.device)).flatten(1)
    rest = torch.arange(end, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, rest], dim=1)
    found, places = values.gather(1, columns).topk(k, dim=1)
    return found, columns.gather(1, places)


@cache
def _has_bf16_tiles() -> bool:
    """Whether this CPU has AMX, with which products of bfloat16 matrices are several times as fast as of float32.

    On other CPUs they are slower.
    """
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "amx_bf16" in cpu.read_text()


@dataclass(frozen=True)
class CandidateTable:
    """The candidates of all rows of a store, which are searched once before a training.

    Attributes:
        rows: [N, K] int32 positions in the memory; -1 for padding, if a row has fewer than K candidates.
        similarities: [N, K, S] float16.
    """

    memory: Memory
    rows: Tensor
    similarities: Tensor

    def resident_on(self, device: torch.device) -> CandidateTable:
        """The same table in the GPU's memory, or unchanged if it would fill more than half of its free memory."""
        n_bytes = self.rows.nbytes + self.similarities.nbytes
        if device.type != "cuda" or n_bytes > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return CandidateTable(self.memory, self.rows.to(device), self.similarities.to(device))

    def of(self, rows: Tensor) -> Candidates:
        """The candidates of these rows [B] of the store, on the memory's device."""
        rows = rows.to(self.rows.device)
        device = self.memory.keys.device
        positions = self.rows[rows].long().to(device)
        return self.memory.candidates(positions.clamp(min=0), self.similarities[rows].to(device), positions >= 0)


@dataclass(frozen=True)
class Neighbourhood:
    """The result of the kernel regression for B rows.

    Attributes:
        log_price: [B] float64 weighted mean of the neighbours' log prices.
        deviation: [B] weighted standard deviation of these log prices.
        weights: [B, K] float64 weights of the candidates; they sum to 1, or to 0 if no candidate is usable.
        features: [B, N_FACTS + S] features of the neighbourhood for the network, without a gradient.
    """

    log_price: Tensor
    deviation: Tensor
    weights: Tensor
    features: Tensor


class _WeightedMean(torch.autograd.Function):
    """The mean [B, S] of similarities [B, K, S] with weights [B, K], without a gradient.

    Its rule for `vmap` reads the similarities, which members of an ensemble share, once; that of `bmm` copies them.
    """

    @staticmethod
    def forward(weights: Tensor, similarities: Tensor) -> Tensor:
        return torch.einsum("bk,bks->bs", weights, similarities)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int, None], weights: Tensor, similarities: Tensor) -> tuple[Tensor, int]:
        return weights.movedim(in_dims[0], 1) @ similarities, 1


class Neighbours(nn.Module):
    """Attention over candidates with learned similarities, whose values are the candidates' log prices.

    Shape:
        candidates of B rows, usable [B, K] bool, median log price [] -> Neighbourhood
    """

    def __init__(self, n_bands: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.change = nn.Parameter(torch.zeros(n_bands))
        last = nn.Linear(PAIR_WIDTH, 1, bias=False)  # a softmax is invariant to a bias, so only rounding would train it
        self.correction = nn.Sequential(nn.Linear(n_bands, PAIR_WIDTH), nn.GELU(), last)

    def forward(self, candidates: Candidates, usable: Tensor, median: Tensor) -> Neighbourhood:
        if self.training and self.dropout:
            usable = usable & kept(usable, self.dropout)
        with torch.autocast(usable.device.type, enabled=False):  # bfloat16 is too imprecise for logits this large
            logits = self._logits(candidates.similarities).masked_fill(~usable, -1e9)
            weights = torch.where(usable, logits.softmax(-1), 0.0)
            log_price = (weights * (candidates.log_prices - median)).sum(-1) + median
            return self._neighbourhood(candidates, logits, weights, log_price, median)

    def _logits(self, similarities: Tensor) -> Tensor:
        """[B, K] logits of the softmax, from similarities [B, K, S]."""
        corrected = self.correction(SIMILARITY_SCALE * similarities).squeeze(-1)
        logits: Tensor = similarities.double() @ band_weights(self.change) + CORRECTION_SCALE * corrected
        return logits

    def _neighbourhood(
        self, candidates: Candidates, logits: Tensor, weights: Tensor, log_price: Tensor, median: Tensor
    ) -> Neighbourhood:
        known, price = weights.detach(), log_price.detach()
        variance = (known * (candidates.log_prices - price.unsqueeze(-1)).square()).sum(-1)
        closeness = logits.detach().logsumexp(-1) / band_weights(self.change.detach()).sum()
        n_effective = 1 / known.square().sum(-1).clamp_min(1e-6)
        facts = [price - median, variance.sqrt(), SIMILARITY_SCALE * closeness.clamp(-1, 1), n_effective.log()]
        shown = known.to(candidates.similarities)
        mean: Tensor = _WeightedMean.apply(shown, candidates.similarities)  # type: ignore[no-untyped-call]
        features = torch.cat([torch.stack(facts, dim=1).to(mean), SIMILARITY_SCALE * mean], dim=1)
        return Neighbourhood(log_price, variance.sqrt().float(), weights, features)
