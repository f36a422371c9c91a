"""Kernel regression: the mean log price of the training rows, weighted by similarity (Nadaraya, 1964; Watson, 1964).

The weights of training rows are a softmax over a weighted sum of cosines, one per source. The weights of that sum, one
per source, are fitted to minimise the SMAPE of the training rows, each predicted without the rows of its own group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.quality.fold import Fold

STEPS, BATCH, LR = 60, 1024, 0.15  # of Adam, which fits the weights
START = 4.0  # initial value of every weight, before softplus
COSINE_VALUES = 400_000_000  # cosines kept in memory while the weights are fitted; in float32, 1.6 GB
CHUNK = 512  # rows compared with all training rows at a time
TOP = (1, 3, 10)  # numbers of nearest neighbours whose mean similarity is a feature
Part: TypeAlias = np.ndarray | csr_array


@dataclass(frozen=True)
class Kernel:
    """Similarity of the rows of a fold to its training rows.

    Attributes:
        fold: the fold.
        parts: name to [N, D] unit vectors, dense or sparse; zeros where a row lacks them.
        device: on which prices are computed.
    """

    fold: Fold
    parts: dict[str, Part]
    device: torch.device

    def fitted(self) -> Tensor:
        """[P] positive weights of the parts."""
        generator = torch.Generator().manual_seed(self.fold.number)
        queries, cosines = self._among_training_rows
        raw = torch.full((len(self.parts),), START, device=self.device, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=LR)
        for _ in range(STEPS):
            batch = torch.randperm(len(queries), generator=generator)[:BATCH]
            rows = queries[batch.numpy()]
            chance = self._softmax(cosines[:, batch.to(self.device)], softplus(raw), self.fold.groups[rows])
            distance = (chance @ self._targets - self._targets[torch.from_numpy(rows).to(self.device)]).abs()
            optimizer.zero_grad()
            torch.tanh(distance / 2).mean().backward()
            optimizer.step()
        return softplus(raw).detach()

    def predicted(self, weights: Tensor) -> np.ndarray:
        """[m] log prices of the rows to predict."""
        fold = self.fold
        no_groups = np.full(len(fold.held), -1)
        return np.concatenate([features[:, 0] for features in self._features(fold.held, no_groups, weights)])

    def features(self, weights: Tensor) -> np.ndarray:
        """[N, 7] features of each row's neighbours among the training rows; those of its own group are excluded.

        They are: mean and standard deviation of the log prices, log of the effective number of neighbours, mean
        similarity of the nearest 1, 3 and 10, and log price of the nearest.
        """
        fold, n_rows = self.fold, next(iter(self.parts.values())).shape[0]
        found = np.zeros((n_rows, 4 + len(TOP)), np.float32)
        found[fold.train] = np.concatenate(list(self._features(fold.train, fold.groups, weights)))
        found[fold.held] = np.concatenate(list(self._features(fold.held, np.full(len(fold.held), -1), weights)))
        return found

    def _features(self, rows: np.ndarray, groups: np.ndarray, weights: Tensor) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), CHUNK):
            chunk = slice(start, start + CHUNK)
            cosines = self._cosines(rows[chunk])
            chance = self._softmax(cosines, weights, groups[chunk])
            mean = chance @ self._targets
            square = chance @ self._targets.square() - mean.square()
            effective = chance.square().sum(1).reciprocal().log()
            near, position = self._logits(cosines, weights, groups[chunk]).topk(min(max(TOP), chance.shape[1]), dim=1)
            near = (near / weights.sum()).clamp_min(-1)
            top = [near[:, :count].mean(1) for count in TOP]
            columns = [mean, square.clamp_min(0).sqrt(), effective, *top, self._targets[position[:, 0]]]
            yield torch.stack(columns, dim=1).cpu().numpy()

    def _softmax(self, cosines: Tensor, weights: Tensor, groups: np.ndarray) -> Tensor:
        return self._logits(cosines, weights, groups).softmax(1)

    def _logits(self, cosines: Tensor, weights: Tensor, groups: np.ndarray) -> Tensor:
        """[Q, n] weighted sums of cosines [P, Q, n]; minus infinity for pairs of rows in the same group."""
        mine, others = torch.from_numpy(groups), torch.from_numpy(self.fold.groups)
        is_own = (mine[:, None] == others).to(self.device)
        return torch.einsum("p,pqn->qn", weights, cosines).masked_fill(is_own, float("-inf"))

    @cached_property
    def _among_training_rows(self) -> tuple[np.ndarray, Tensor]:
        """Positions [Q] of a sample of training rows, as large as memory allows, and their cosines [P, Q, n] to all."""
        n_rows = len(self.fold.train)
        n_queries = max(1, min(n_rows, COSINE_VALUES // (len(self.parts) * n_rows)))
        queries = np.sort(np.random.default_rng(self.fold.number).permutation(n_rows)[:n_queries])
        chunks = np.array_split(self.fold.train[queries], -(-n_queries // CHUNK))
        return queries, torch.cat([self._cosines(chunk) for chunk in chunks], dim=1)

    def _cosines(self, rows: np.ndarray) -> Tensor:
        """[P, Q, n] cosines between these rows and the training rows."""
        found = [_products(part, rows, self.fold.train, self.device) for part in self.parts.values()]
        return torch.stack(found)

    @property
    def _targets(self) -> Tensor:
        return torch.from_numpy(self.fold.targets.astype(np.float32)).to(self.device)


def _products(part: Part, rows: np.ndarray, others: np.ndarray, device: torch.device) -> Tensor:
    if isinstance(part, np.ndarray):
        left, right = (torch.from_numpy(part[which]).to(device) for which in (rows, others))
        return left @ right.T
    return torch.from_numpy((part[rows] @ part[others].T).toarray().astype(np.float32)).to(device)
