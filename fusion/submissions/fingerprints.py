"""Fingerprints of embeddings: 64 bits per vector, which show whether a vector has changed or moved to another id.

A submission stores the fingerprints of its embeddings, and the next night compares its own with them. A fingerprint is
a SimHash (Charikar, 2002): the signs of 64 random projections of the standardised vector. Two vectors with an angle a
between them differ in about 64 a/π bits. Rounding to float16 changes at most 2 bits, while the vectors of two different
products differ in about 32. A cryptographic hash could not distinguish rounding from another product.

The bits of two roles also give their agreement: how strongly their vectors are related across products. It drops when
one of the two is stored under wrong ids, which shows on the very first night.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusion.data.row_store import RowStore
from fusion.data.tables import positions_of
from fusion.distributed.world import World
from fusion.nn.price_model import PriceModel

N_BITS = 64
CHUNK = 1024  # rows that are standardised at a time, which limits the memory needed
# A product's vector counts as the same if it differs from its former one in at most so many bits, an angle of 34
# degrees. The closest of 10 million pairs of unrelated vectors differ in about 11 bits. The vector of an edited title
# mostly differs in fewer bits than this limit, that of a new photo in more.
MAX_SAME_BITS = 12
# A vector that more products than this share is taken for a placeholder such as "no image". Products may change from
# and to it every night, so it does not count as the vector of another product.
PLACEHOLDER_ROWS = 50
# An agreement is measured on at most so many rows: its standard error is then below 1% of its value.
MAX_AGREEMENT_ROWS = 20_000
N_SHUFFLES = 10  # how often rows are shuffled to measure the agreement that arises by chance
# Number of ones in each byte.
_POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class EmbeddingStatistics:
    """Fingerprints of all embeddings of a table, and how their distribution differs from that of the training rows.

    Attributes:
        prints: on rank 0, one row per sample with index sample_id and a uint64 column per role, 0 where the embedding
            is missing; on other ranks, no rows.
        shift: role to the shift of the mean, in standard deviations of the training rows, as the root mean square over
            dimensions. The training rows have 0.
        spread: role to the variance, divided by that of the training rows. The training rows have 1.
    """

    prints: pd.DataFrame
    shift: dict[str, float]
    spread: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Result of comparing the fingerprints of one role with those of an earlier night.

    Attributes:
        known: number of ids that have a fingerprint in both.
        moved: how many of these now have the vector that another id had.
        new: how many of these now have a vector that no id had.
    """

    known: int
    moved: int
    new: int


@dataclass(frozen=True)
class Sums:
    """What statistics are computed from, of some rows of a table.

    Attributes:
        prints: as in `EmbeddingStatistics`.
        totals: on every rank, the sums of `_of_rows` over these rows.
    """

    prints: pd.DataFrame
    totals: dict[str, np.ndarray]


def statistics_of(model: PriceModel, store: RowStore, ids: pd.Index, world: World) -> EmbeddingStatistics:
    """Computes fingerprints and moments of all rows of the store; each rank handles a share of the rows.

    All ranks get the moments; only rank 0 gets the fingerprints.
    """
    return joined([sums_of(model, store, ids, world)])


def sums_of(model: PriceModel, store: RowStore, ids: pd.Index, world: World) -> Sums:
    """Computes what `joined` needs of the rows of the store; each rank handles a share of the rows."""
    mine = torch.arange(len(store))[world.share(len(store))]
    prints, sums = _of_rows(model, store, mine, world.device)
    totals = np.split(np.array(world.sum(np.concatenate(list(sums.values())).tolist())), _bounds(sums))
    found = world.gather_on_main(prints)
    table = pd.DataFrame(np.concatenate(found), index=ids) if found else pd.DataFrame(prints[:0])
    return Sums(table.set_axis(list(store.dims), axis=1), dict(zip(sums, totals, strict=True)))


def joined(parts: Sequence[Sums]) -> EmbeddingStatistics:
    """The statistics of a table whose rows are those of the parts, in their order; there is at least one part."""
    prints = parts[0].prints if len(parts) == 1 else pd.concat([part.prints for part in parts])
    moments = {role: np.sum([part.totals[role] for part in parts], axis=0) for role in parts[0].totals}
    return EmbeddingStatistics(
        prints,
        {role: _shift(total) for role, total in moments.items()},
        {role: _spread(total) for role, total in moments.items()},
    )


def fingerprints(model: PriceModel, store: RowStore, rows: Tensor, device: torch.device) -> np.ndarray:
    """[n, R] uint64: fingerprints of the given rows [n] of the store, with one column per role in the store's order."""
    return _of_rows(model, store, rows, device)[0]


def _of_rows(
    model: PriceModel, store: RowStore, rows: Tensor, device: torch.device
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Fingerprints [n, R], and the sums from which moments are computed.

    The sums are, for each role, [1 + 2D]: the number of rows that have the role, then the sum and the sum of squares of
    the standardised values in each of the D dimensions that vary in the training rows (scale above 0).
    """
    projections = {role: _projection(dim).to(device) for role, dim in store.dims.items()}
    sums = {role: np.zeros(1 + 2 * int((model.get_buffer(f"scale_{role}") > 0).sum())) for role in store.dims}
    prints = np.zeros((len(rows), len(store.dims)), np.uint64)
    for start in range(0, len(rows), CHUNK):
        batch = store.batch(rows[start : start + CHUNK], device)
        for column, (role, values) in enumerate(model.standardised(batch.inputs, batch.present).items()):
            there = batch.present[role].cpu().numpy()
            bits = (values @ projections[role] > 0).cpu().numpy()
            packed = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
            prints[start : start + CHUNK, column] = np.where(there, packed, 0)
            sums[role] += _sums(values[:, model.get_buffer(f"scale_{role}") > 0], int(there.sum()))
    return prints, sums


def _projection(dim: int) -> Tensor:
    """[D, 64] random projections. They depend on D alone, so that fingerprints of different nights are comparable.

    NumPy guarantees that the legacy `RandomState` never changes its numbers (NEP 19).
    """
    return torch.from_numpy(np.random.RandomState(dim).standard_normal((dim, N_BITS)).astype(np.float32))


def _sums(values: Tensor, n_rows: int) -> np.ndarray:
    # `values` are zeros in rows without the role, which add nothing to the sums.
    values = values.double()
    return np.concatenate([[n_rows], values.sum(0).cpu().numpy(), values.square().sum(0).cpu().numpy()])


def _bounds(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.cumsum([len(total) for total in sums.values()])[:-1]


def _shift(total: np.ndarray) -> float:
    """`EmbeddingStatistics.shift` from the sums of a role; 0 if no row has the role."""
    n_rows, (mean, _) = total[0], _means(total)
    return float(np.sqrt((mean**2).mean())) if n_rows and len(mean) else 0.0


def _spread(total: np.ndarray) -> float:
    """`EmbeddingStatistics.spread` from the sums of a role; 1 if no row has the role."""
    n_rows, (mean, square) = total[0], _means(total)
    return max(0.0, float((square - mean**2).mean())) if n_rows and len(mean) else 1.0


def _means(total: np.ndarray) -> np.ndarray:
    """[2, D] mean and mean square of each dimension."""
    return np.asarray(total[1:].reshape(2, -1) / max(1.0, total[0]))


def compared(before: pd.Series, now: pd.Series) -> Comparison:
    """Compares the fingerprints of a role, indexed by sample_id, with those of an earlier night."""
    now, before = now[now > 0], before[before > 0]
    positions = positions_of(now.index, before.index)  # in `before`; -1 for an id that it does not have
    is_known = positions >= 0
    old, new = before.to_numpy(np.uint64)[positions[is_known]], now.to_numpy(np.uint64)[is_known]
    other = new[_distance(old, new) > MAX_SAME_BITS]
    if not len(other):  # as on most nights: then the search below is not needed
        return Comparison(len(new), 0, 0)
    counts = before.value_counts()
    moved = int(pd.Series(other).isin(counts.index[counts <= PLACEHOLDER_ROWS]).sum())
    return Comparison(len(new), moved, len(other) - moved)


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[N] number of bits in which the fingerprints [N] uint64 differ."""
    differing = np.ascontiguousarray(first ^ second).view(np.uint8).reshape(-1, 8)
    return np.asarray(_POPCOUNT[differing].sum(axis=1))


def agreements(prints: pd.DataFrame) -> dict[str, float]:
    """How similar the structure of two roles is over the products: "clip_image siglip_image" to 0 … 1, for each pair.

    It is linear CKA (Kornblith et al., 2019) of the fingerprints' bits, minus the value that is expected by chance. If
    one of the two roles is stored under wrong ids, it drops to about 0, whatever the encoders are.
    """
    return {pair: measured for pair, (measured, _) in agreements_with_chance(prints).items()}


def agreements_with_chance(prints: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """As `agreements`, each with the largest agreement that `N_SHUFFLES` random shuffles of the rows give."""
    step = -(-len(prints) // MAX_AGREEMENT_ROWS)  # rounded up; 0 without rows
    sample, found = prints.iloc[:: step or 1], {}
    for first, second in combinations(prints.columns, 2):
        both = sample[(sample[first] > 0) & (sample[second] > 0)]
        if len(both) > 1:
            found[f"{first} {second}"] = _agreement(_signs(both[first]), _signs(both[second]))
    return found


def _signs(prints: pd.Series) -> np.ndarray:
    """[N, 64] bits of the fingerprints as -1 and 1, minus the mean of each column."""
    bits = np.unpackbits(np.ascontiguousarray(prints.to_numpy(np.uint64)).view(np.uint8).reshape(-1, 8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1
    return np.asarray(signs - signs.mean(0))


def _agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Agreement of two roles, and the largest one by chance, from `_signs` of both."""
    own = _shared(first, first) * _shared(second, second)
    if own <= 0:  # one of the two is constant
        return 0.0, 0.0
    generator = np.random.default_rng(0)
    chance = [_shared(first[generator.permutation(len(first))], second) for _ in range(N_SHUFFLES)]
    return _shared(first, second) / own**0.5, max(chance) / own**0.5


def _shared(first: np.ndarray, second: np.ndarray) -> float:
    """Squared norm of the covariance, minus its expected value for independent columns; at least 0."""
    n_rows = len(first)
    covariance = first.T @ second / n_rows
    expected = float((first**2).sum() / n_rows) * float((second**2).sum() / n_rows) / n_rows
    return max(0.0, float((covariance**2).sum()) - expected)


def to_parquet(prints: pd.DataFrame) -> bytes:
    """The content of `fingerprints.parquet`: sample_id, and one uint64 column per role."""
    buffer = io.BytesIO()
    prints.rename_axis("sample_id").reset_index().to_parquet(buffer, index=False)
    return buffer.getvalue()
