"""64 bits for each embedding: enough to see the next night whether a vector has changed or stands under another id.

A fingerprint is a SimHash (Charikar, 2002): the signs of 64 random projections of the standardised vector. Two vectors
at an angle of a differ in about 64 a/π bits: rounding to float16 changes at most 2 of them, while the vectors of two
different products differ in about 32. A cryptographic hash could not tell rounding from another product.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
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
CHUNK = 1024  # rows standardised at a time
# Bits in which a product's vector may differ from its former one: an angle of 34 degrees. The closest of 10 million
# pairs of unrelated vectors differ in about 11 bits; an edited title mostly stays below, a new photo does not.
MAX_SAME_BITS = 12
# A vector that more products share is a placeholder such as "no image": it may come and go under any id.
PLACEHOLDER_ROWS = 50
MAX_AGREEMENT_ROWS = 20_000  # rows that an agreement is measured on: its error is then below 1% of its value
N_SHUFFLES = 10  # how often rows are shuffled to see what agreement chance alone gives
_POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class Look:
    """What the embeddings of a table look like to a model.

    Attributes:
        prints: one row per sample, index sample_id, a uint64 column for each role, 0 where it is missing; no row on
            any rank but 0.
        shift: role to the root mean square, over dimensions, of the mean in deviations of the training rows: 0 there.
        spread: role to the variance as a multiple of the training rows': 1 there.
    """

    prints: pd.DataFrame
    shift: dict[str, float]
    spread: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Fingerprints of one role against former ones.

    Attributes:
        known: ids that have one in both.
        moved: of these, how many now have the vector that another id had.
        new: of these, how many have a vector that no id had.
    """

    known: int
    moved: int
    new: int


def look(model: PriceModel, store: RowStore, ids: pd.Index, world: World) -> Look:
    """Looks at all rows of the store, shared out among the ranks; the fingerprints of all rows are on rank 0 only."""
    mine = torch.arange(len(store))[world.share(len(store))]
    prints, sums = _of_rows(model, store, mine, world.device)
    totals = np.split(np.array(world.sum(np.concatenate(list(sums.values())).tolist())), _bounds(sums))
    moments = dict(zip(sums, totals, strict=True))
    found = world.gather_on_main(prints)
    table = pd.DataFrame(np.concatenate(found), index=ids) if found else pd.DataFrame(prints[:0])
    return Look(
        table.set_axis(list(store.dims), axis=1),
        {role: _shift(total) for role, total in moments.items()},
        {role: _spread(total) for role, total in moments.items()},
    )


def fingerprints(model: PriceModel, store: RowStore, rows: Tensor, device: torch.device) -> np.ndarray:
    """[n, R] uint64 of the store's rows [n], a column for each role in the order of the store's."""
    return _of_rows(model, store, rows, device)[0]


def _of_rows(
    model: PriceModel, store: RowStore, rows: Tensor, device: torch.device
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Fingerprints [n, R]; and by role the number of rows, then sums [D] and squares [D] of the standardised values."""
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
    """[D, 64] the same for all time: NumPy never changes what this generator gives (NEP 19)."""
    return torch.from_numpy(np.random.RandomState(dim).standard_normal((dim, N_BITS)).astype(np.float32))


def _sums(values: Tensor, n_rows: int) -> np.ndarray:
    # Missing rows are zeros here, and add nothing.
    values = values.double()
    return np.concatenate([[n_rows], values.sum(0).cpu().numpy(), values.square().sum(0).cpu().numpy()])


def _bounds(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.cumsum([len(total) for total in sums.values()])[:-1]


def _shift(total: np.ndarray) -> float:
    n_rows, (mean, _) = total[0], _means(total)
    return float(np.sqrt((mean**2).mean())) if n_rows and len(mean) else 0.0


def _spread(total: np.ndarray) -> float:
    n_rows, (mean, square) = total[0], _means(total)
    return max(0.0, float((square - mean**2).mean())) if n_rows and len(mean) else 1.0


def _means(total: np.ndarray) -> np.ndarray:
    """[2, D] mean and mean square."""
    return np.asarray(total[1:].reshape(2, -1) / max(1.0, total[0]))


def compared(before: pd.Series, now: pd.Series) -> Comparison:
    """Fingerprints of a role, by sample_id, against those of an earlier night."""
    now, before = now[now > 0], before[before > 0]
    places = positions_of(now.index, before.index)
    old, new = before.to_numpy(np.uint64)[places[places >= 0]], now.to_numpy(np.uint64)[places >= 0]
    other = new[_distance(old, new) > MAX_SAME_BITS]
    if not len(other):  # most nights: no need to look for them among all others
        return Comparison(len(new), 0, 0)
    counts = before.value_counts()
    moved = int(pd.Series(other).isin(counts.index[counts <= PLACEHOLDER_ROWS]).sum())
    return Comparison(len(new), moved, len(other) - moved)


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[N] bits in which two [N] uint64 differ."""
    differing = np.ascontiguousarray(first ^ second).view(np.uint8).reshape(-1, 8)
    return np.asarray(_POPCOUNT[differing].sum(axis=1))


def agreements(prints: pd.DataFrame) -> dict[str, float]:
    """How much of each pair of roles says the same of a product, "clip_image siglip_image" to 0 … 1.

    Linear CKA (Kornblith et al., 2019) of the fingerprints' bits, less what chance gives. Rows under other ids in one
    of the two bring it to 0, whatever the encoders are.
    """
    return {pair: measured for pair, (measured, _) in agreements_with_chance(prints).items()}


def agreements_with_chance(prints: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """As `agreements`, each with the largest that `N_SHUFFLES` shuffles of the rows give."""
    step = -(-len(prints) // MAX_AGREEMENT_ROWS)
    sample, found = prints.iloc[:: step or 1], {}
    for first, second in combinations(prints.columns, 2):
        both = sample[(sample[first] > 0) & (sample[second] > 0)]
        if len(both) > 1:
            found[f"{first} {second}"] = _agreement(_signs(both[first]), _signs(both[second]))
    return found


def _signs(prints: pd.Series) -> np.ndarray:
    """[N, 64] of -1 and 1, centred."""
    bits = np.unpackbits(np.ascontiguousarray(prints.to_numpy(np.uint64)).view(np.uint8).reshape(-1, 8), axis=1)
    signs = bits.astype(np.float32) * 2 - 1
    return np.asarray(signs - signs.mean(0))


def _agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    own = _shared(first, first) * _shared(second, second)
    if own <= 0:  # one of the two is constant
        return 0.0, 0.0
    generator = np.random.default_rng(0)
    chance = [_shared(first[generator.permutation(len(first))], second) for _ in range(N_SHUFFLES)]
    return _shared(first, second) / own**0.5, max(chance) / own**0.5


def _shared(first: np.ndarray, second: np.ndarray) -> float:
    """Squared norm of the covariance, less what independent columns of this many rows would give on average."""
    n_rows = len(first)
    covariance = first.T @ second / n_rows
    expected = float((first**2).sum() / n_rows) * float((second**2).sum() / n_rows) / n_rows
    return max(0.0, float((covariance**2).sum()) - expected)


def to_parquet(prints: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    prints.rename_axis("sample_id").reset_index().to_parquet(buffer, index=False)
    return buffer.getvalue()
