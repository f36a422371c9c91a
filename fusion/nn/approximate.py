"""Approximate search for the most similar of millions of keys, with an inverted-file index of faiss.

Each key belongs to the list of the centroid with the highest cosine (spherical k-means). A query only searches the
lists of the nearest centroids, one of `PROBED_SHARE`. There, keys are compared by codes of 4 bits per 4 columns
(product quantisation; Jegou et al., 2011). `Memory.search` then compares the found keys exactly, and keeps the best.

Centroids and codes are fitted in this module, on a fixed sample and in float64, so that they do not depend on the
number of threads. They are stored with the memory; faiss only encodes and searches.

C is the number of key columns, L of lists, G of codes per key.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS_PER_CODE = 4
VALUES_PER_CODE = 16  # codes of 4 bits, whose distance tables fit into CPU registers (faiss' "fast scan")
# The number of lists, per square root of the number of rows: a million rows have 8,000 lists of 125 rows. If the same
# number of rows is searched, many short lists miss fewer neighbours than a few long ones. But queries are compared with
# all centroids; here that takes a hundredth of the time of a comparison with all rows.
LISTS_PER_ROOT = 8
LEAST_ROWS_PER_LIST = 4  # on average; limits the number of lists of small memories
PROBED_SHARE = 8  # a query searches 1/8 of the lists,
LEAST_PROBED = 32  # but at least 32
SAMPLE_PER_LIST = 4  # rows per list on which centroids are fitted
ROUNDS = 2  # iterations of k-means; with ten, the centroids were not better
CODE_SAMPLE = 4096  # rows on which codes are fitted
CODE_ROUNDS = 8  # iterations of k-means for codes
BLOCK = 16_384  # rows that are processed at a time, to limit memory
HINT = "pip install faiss-cpu"


@dataclass(frozen=True)
class Partition:
    """The division of a memory's rows into lists, and the codebook of their codes.

    Attributes:
        centroids: [L, C] float32 unit vectors.
        lists: [N] int32 list of each row.
        codebook: [G, VALUES_PER_CODE, COLUMNS_PER_CODE] float32 vectors that the codes stand for.
    """

    centroids: Tensor
    lists: Tensor
    codebook: Tensor


def is_installed() -> bool:
    """Whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def fitted(keys: Tensor, root: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Fits the centroids and the codebook of a `Partition`.

    Args:
        keys: [n, C].
        root: [C] square roots of the columns' weights. With both keys and queries multiplied by them, an inner product
            is a weighted similarity.
    """
    n_lists = number_of_lists(len(keys))
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    sample = keys[order[: SAMPLE_PER_LIST * n_lists]].double() * root.double()
    return _centroids(F.normalize(sample, dim=1), n_lists).float(), _codebook(sample[:CODE_SAMPLE]).float()


def number_of_lists(n_rows: int) -> int:
    """The number of lists for so many rows.

    >>> [number_of_lists(n_rows) for n_rows in (1, 100, 1_000_000)]
    [1, 25, 8000]
    """
    return max(1, min(n_rows // LEAST_ROWS_PER_LIST, LISTS_PER_ROOT * math.isqrt(n_rows)))


def _centroids(rows: Tensor, n: int) -> Tensor:
    """[n, C] centroids of unit vectors [m, C], which are in random order; the first n are the initial centroids."""
    centroids = rows[:n]
    for _ in range(ROUNDS):
        sums = torch.zeros_like(centroids).index_add_(0, nearest(rows, centroids), rows)
        centroids = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centroids)
    return centroids


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """[m] int64: for each row [m, C], the centroid [L, C] with the highest cosine."""
    return torch.cat([(some @ centroids.T).argmax(1) for some in torch.split(rows, BLOCK // 8)])


def _codebook(rows: Tensor) -> Tensor:
    """[G, VALUES_PER_CODE, COLUMNS_PER_CODE] codebook: k-means of each group of columns of rows [m, C]."""
    points = _padded(rows).view(len(rows), -1, COLUMNS_PER_CODE).transpose(0, 1).contiguous()
    values = points[:, torch.arange(VALUES_PER_CODE) % len(rows)]
    for _ in range(CODE_ROUNDS):
        distances = values.square().sum(2).unsqueeze(1) - 2 * points @ values.transpose(1, 2)
        is_in = F.one_hot(distances.argmin(2), VALUES_PER_CODE).to(points)
        counts = is_in.sum(1).unsqueeze(2)
        values = torch.where(counts > 0, is_in.transpose(1, 2) @ points / counts.clamp_min(1), values)
    return values


def _padded(rows: Tensor) -> Tensor:
    """The rows [m, C] padded with columns of zeros to a multiple of `COLUMNS_PER_CODE`."""
    return F.pad(rows, (0, -rows.shape[1] % COLUMNS_PER_CODE))


def fits(partition: Partition, n_rows: int, n_columns: int) -> bool:
    """Whether the partition has the shapes for so many rows and columns, and contains only valid numbers."""
    centroids, lists, codebook = partition.centroids, partition.lists, partition.codebook
    n_codes = -(-n_columns // COLUMNS_PER_CODE)
    return (
        lists.shape == (n_rows,)
        and codebook.shape == (n_codes, VALUES_PER_CODE, COLUMNS_PER_CODE)
        and centroids.dim() == 2
        and centroids.shape[1] == n_columns
        and bool((lists >= 0).all() and (lists < len(centroids)).all())
        and bool(centroids.isfinite().all() and codebook.isfinite().all())
    )


class Index:
    """A faiss index of the keys of a partition.

    Args:
        keys: [N, C] float16.
        rows: [n] positions of the keys that may be found.
        root: [C] square roots of the columns' weights.
    """

    def __init__(self, partition: Partition, keys: Tensor, rows: Tensor, root: Tensor) -> None:
        import faiss

        self.root = root.float()
        centroids = _padded(partition.centroids).numpy()
        (n_lists, n_columns), n_codes = centroids.shape, len(partition.codebook)
        self.quantizer = faiss.IndexFlatIP(n_columns)
        self.quantizer.add(centroids)
        coded = faiss.IndexIVFPQ(self.quantizer, n_columns, n_lists, n_codes, 4, faiss.METRIC_INNER_PRODUCT)
        coded.by_residual = False
        faiss.copy_array_to_vector(partition.codebook.reshape(-1).numpy(), coded.pq.centroids)
        coded.is_trained = True
        self._add(coded, partition, keys, rows)
        self.index: Any = faiss.IndexIVFPQFastScan(coded)
        self.index.nprobe = min(n_lists, max(LEAST_PROBED, -(-n_lists // PROBED_SHARE)))

    def _add(self, coded: Any, partition: Partition, keys: Tensor, rows: Tensor) -> None:
        import faiss

        _set_threads()
        for some in torch.split(rows, BLOCK):
            vectors = self._vectors(keys[some])
            places, ids = partition.lists[some].long().numpy(), some.numpy()
            coded.add_core(len(ids), *map(faiss.swig_ptr, (vectors, ids, places)))

    def _vectors(self, keys: Tensor) -> Any:
        return _padded(keys.float() * self.root).contiguous().numpy()

    def rows(self, queries: Tensor, k: int) -> Tensor:
        """[B, k] int64 positions of probably most similar rows to the queries [B, C]; -1 for padding."""
        _set_threads()
        return torch.from_numpy(self.index.search(self._vectors(queries), k)[1])


def _set_threads() -> None:
    """Makes faiss use as many threads as torch. Its own default is all cores, which the ranks of a node share."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
