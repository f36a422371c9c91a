"""Which of millions of keys may be most like a row, without comparing it with all of them: inverted lists, by faiss.

Keys are brought into lists by the centroid that is nearest by cosine (spherical k-means). Of a row that is asked for,
the lists of the nearest centroids are looked through, one in `PROBED_SHARE`, by codes of 4 bits for every 4 columns
(product quantisation; Jegou et al., 2011). `Memory.search` compares exactly what is found, and keeps a share of it.

Centroids and codes are fitted here, on a fixed sample and in float64, so that the number of threads does not change
them. They lie with the memory, and faiss only encodes and searches.

C is the number of key columns, L of lists, G of codes of a key.
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
VALUES_PER_CODE = 16  # of 4 bits, which faiss adds up in registers
# Lists of a million rows: 8,000 of 125. Many short lists lose less than few long ones when the same number of rows is
# looked through, and cost a product with all centroids: of a hundredth of the time of one with all rows.
LISTS_PER_ROOT = 8
LEAST_ROWS_PER_LIST = 4
PROBED_SHARE = 8  # one list in so many is looked through, and
LEAST_PROBED = 32
SAMPLE_PER_LIST = 4  # rows that centroids are fitted on
ROUNDS = 2  # of k-means; ten find centroids that are no better
CODE_SAMPLE = 4096  # rows that codes are fitted on
CODE_ROUNDS = 8
BLOCK = 16_384  # rows at a time
HINT = "pip install faiss-cpu"


@dataclass(frozen=True)
class Partition:
    """How the rows of a memory are kept in lists.

    Attributes:
        centroids: [L, C] float32 unit vectors.
        lists: [N] int32 list of each row.
        codebook: [G, VALUES_PER_CODE, COLUMNS_PER_CODE] float32, what a code stands for.
    """

    centroids: Tensor
    lists: Tensor
    codebook: Tensor


def is_installed() -> bool:
    """Whether faiss is."""
    return importlib.util.find_spec("faiss") is not None


def fitted(keys: Tensor, root: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids and codebook of a `Partition`, from keys [n, C] and the square roots [C] of their columns' weights."""
    n_lists = number_of_lists(len(keys))
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    sample = keys[order[: SAMPLE_PER_LIST * n_lists]].double() * root.double()
    return _centroids(F.normalize(sample, dim=1), n_lists).float(), _codebook(sample[:CODE_SAMPLE]).float()


def number_of_lists(n_rows: int) -> int:
    """
    >>> [number_of_lists(n_rows) for n_rows in (1, 100, 1_000_000)]
    [1, 25, 8000]
    """
    return max(1, min(n_rows // LEAST_ROWS_PER_LIST, LISTS_PER_ROOT * math.isqrt(n_rows)))


def _centroids(rows: Tensor, n: int) -> Tensor:
    """[n, C] unit vectors, of unit vectors [m, C] in random order."""
    centroids = rows[:n]
    for _ in range(ROUNDS):
        sums = torch.zeros_like(centroids).index_add_(0, nearest(rows, centroids), rows)
        centroids = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centroids)
    return centroids


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """[m] int64: which centroid [L, C] is nearest to each row [m, C] by cosine."""
    return torch.cat([(some @ centroids.T).argmax(1) for some in torch.split(rows, BLOCK // 8)])


def _codebook(rows: Tensor) -> Tensor:
    """[G, VALUES_PER_CODE, COLUMNS_PER_CODE] by k-means of the rows' [m, C] columns, four at a time."""
    points = _padded(rows).view(len(rows), -1, COLUMNS_PER_CODE).transpose(0, 1).contiguous()
    values = points[:, torch.arange(VALUES_PER_CODE) % len(rows)]
    for _ in range(CODE_ROUNDS):
        distances = values.square().sum(2).unsqueeze(1) - 2 * points @ values.transpose(1, 2)
        is_in = F.one_hot(distances.argmin(2), VALUES_PER_CODE).to(points)
        counts = is_in.sum(1).unsqueeze(2)
        values = torch.where(counts > 0, is_in.transpose(1, 2) @ points / counts.clamp_min(1), values)
    return values


def _padded(rows: Tensor) -> Tensor:
    """The rows [m, C] with zeros behind them, so that their columns can be divided into codes."""
    return F.pad(rows, (0, -rows.shape[1] % COLUMNS_PER_CODE))


def fits(partition: Partition, n_rows: int, n_columns: int) -> bool:
    """Whether it is a partition of so many rows of so many columns, and all of its numbers are finite."""
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
    """Keys in the lists of a partition, as codes.

    Args:
        keys: [N, C] float16.
        rows: [n] positions of those that may be found.
        root: [C] square roots of the weights of the columns.
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
        """[B, k] int64 positions of rows that may be most similar to the queries [B, C]; -1 where there are fewer."""
        _set_threads()
        return torch.from_numpy(self.index.search(self._vectors(queries), k)[1])


def _set_threads() -> None:
    """faiss has a pool of threads of its own, which knows nothing of those that the ranks of a node may use."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
