"""Splits the rows into training and validation: stratified by price, or by date, with near-duplicates on one side.

The split does not depend on the order of the rows.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fusion import log
from fusion.config import RunConfig
from fusion.data.dates import timestamp, timestamps
from fusion.data.tables import Table
from fusion.errors import DataError

N_STRATA = 10  # deciles of price; small tables get fewer, so that each part has a group of every stratum
# A group larger than this share of the smallest part counts as large and is assigned before the others. 20 such groups
# would fill the part, so assigning them in turn like small groups could miss the wanted shares by far.
LARGE_SHARE = 0.05
# The share of validation rows may deviate by so much, relative to the wanted share, without a warning. Only large
# groups or very few rows cause more.
MAX_DEVIATION = 0.1


def split_rows(table: Table, groups: np.ndarray, config: RunConfig) -> pd.DataFrame:
    """Assigns each row to a side, the same for all rows of a group.

    Args:
        table: N rows with prices, sorted by id.
        groups: [N] group of near-duplicates of each row, from `near_duplicate_groups`.

    Returns:
        A table with one row per sample, in the order of `table`, and the columns sample_id, price, group (int) and
        side: "train", "validation" or, in a split by date, "dropped". If every row validates in one of the folds, side
        is "validation" for all, and there is one more column, fold.

    Raises:
        DataError: fewer groups than parts, an unusable column of dates, or no row on one side.
    """
    if config.folds is not None and config.fold is None:
        return _in_folds(table, groups, config)
    if config.validate_after is not None:
        validates, dropped = _sides_by_date(table, groups, *config.validate_after)
    else:
        validates = _sides(table, groups, config)
        dropped = np.zeros_like(validates)
    side = pc.if_else(pa.array(validates), "validation", pc.if_else(pa.array(dropped), "dropped", "train"))
    side = side.cast(pa.large_string())
    log.info(
        event="split",
        train=int((~validates & ~dropped).sum()),
        validation=int(validates.sum()),
        **({"dropped": int(dropped.sum())} if dropped.any() else {}),
        groups=int(groups.max() + 1),
        rows_in_groups=int((np.bincount(groups)[groups] > 1).sum()),
    )
    return pd.DataFrame({"sample_id": table.ids, "price": table.prices, "group": groups, "side": pd.array(side, "str")})


def _in_folds(table: Table, groups: np.ndarray, config: RunConfig) -> pd.DataFrame:
    """The split in which every row validates: those members predict it that do not train on its fold."""
    folds = _parts(table, groups, config)
    log.info(event="split", rows=len(folds), folds=" ".join(map(str, np.bincount(folds))), groups=int(groups.max() + 1))
    side = pd.array(["validation"] * len(folds), "str")
    return pd.DataFrame({"sample_id": table.ids, "price": table.prices, "group": groups, "side": side, "fold": folds})


def part_of(split: pd.DataFrame, held_out: int) -> np.ndarray:
    """[N] the part of the split that each row is in.

    With folds, this is the row's fold. Otherwise it is `held_out` for validation rows, another number for training
    rows, and -1 for rows that neither train nor validate.
    """
    if "fold" in split:
        return split["fold"].to_numpy(np.int64)
    others = np.where(split["side"] == "train", int(held_out == 0), -1)
    return np.where(split["side"] == "validation", held_out, others)


def _sides(table: Table, groups: np.ndarray, config: RunConfig) -> np.ndarray:
    """[N] bool: whether the row validates."""
    shares, wanted = _shares(config)
    validates: np.ndarray = _parts(table, groups, config) == wanted
    _check_share(validates, shares[wanted], np.bincount(groups))
    return validates


def _parts(table: Table, groups: np.ndarray, config: RunConfig) -> np.ndarray:
    """[N] part of each row. Groups are never divided, and each part gets about its share of the rows."""
    shares, _ = _shares(config)
    sizes = np.bincount(groups)
    if len(sizes) < len(shares):
        raise DataError(
            f"{len(sizes)} groups of rows cannot be split into {len(shares)} parts; rows with the same text, vector or "
            "--group-column value stay together",
            "add rows, or use fewer --folds",
        )
    parts: np.ndarray = draw_parts(sizes, _strata(table, groups, shares), shares, config.seed)[groups]
    return parts


def _sides_by_date(table: Table, groups: np.ndarray, column: str, day: str) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays [N] bool: rows that validate, and rows that are dropped.

    Rows on or after the day validate. Earlier rows that are near-duplicates of these are dropped, because training on
    them would leak into the validation score.
    """
    found = timestamps(table.column(column, "--validate-after"), "--validate-after").to_numpy("datetime64[us]")
    validates: np.ndarray = found >= timestamp(day)
    dropped: np.ndarray = np.isin(groups, groups[validates]) & ~validates
    if not validates.any() or (validates | dropped).all():
        missing = "validates" if not validates.any() else "trains"
        days = " to ".join(np.datetime_as_string([found.min(), found.max()], "D"))
        raise DataError(
            f"no row {missing}: the {len(found)} dates in {column!r} are {days}, but --validate-after is {day}",
            "give --validate-after a date between them",
        )
    return validates, dropped


def _shares(config: RunConfig) -> tuple[np.ndarray, int]:
    """The wanted share of rows of each part, and the number of the part that validates."""
    if config.folds is not None:
        return np.full(config.folds, 1 / config.folds), config.fold or 0
    return np.array([config.val_fraction, 1 - config.val_fraction]), 0


def _strata(table: Table, groups: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[G] stratum of each group: the quantile of its median price, from 0. Few groups get fewer strata."""
    prices = pd.Series(table.prices).groupby(groups).median().to_numpy()
    ranks = np.empty(len(prices), np.int64)
    ranks[np.argsort(prices, kind="stable")] = np.arange(len(prices))
    n_strata = max(1, min(N_STRATA, int(len(prices) * shares.min())))
    return np.asarray(ranks * n_strata // len(prices), np.int64)


def draw_parts(sizes: np.ndarray, strata: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """[G] part of each group, chosen so that each part gets its share of the rows of every stratum.

    First, large groups (see `LARGE_SHARE`) are assigned, the largest first, each to the part that lacks the largest
    share of its rows. Then all others are ordered by stratum and size, shuffled among equals, and dealt to the parts in
    turn.

    Args:
        sizes: [G] rows of each group.
        strata: [G] stratum of each group.
        shares: [P] share of the rows of each part; they sum to 1.
    """
    generator = np.random.default_rng(seed)
    parts = np.zeros(len(sizes), np.int64)
    room = shares * sizes.sum()  # rows that each part still lacks
    large = sizes > max(1, LARGE_SHARE * room.min())
    for group in sorted(np.flatnonzero(large), key=lambda one: (-sizes[one], one)):
        parts[group] = _emptiest(room, shares, int(sizes[group]), generator)
        room[parts[group]] -= sizes[group]
    small = np.flatnonzero(~large)
    order = small[_shuffled_order(strata[small], sizes[small], generator)]
    parts[order] = _in_turn(len(order), np.maximum(room, 0))
    return parts


def _shuffled_order(strata: np.ndarray, sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """[n] positions in the order of stratum and size, shuffled among equals: a stable sort of shuffled positions."""
    shuffled = np.empty(len(sizes), np.int64)
    shuffled[generator.permutation(len(sizes))] = np.arange(len(sizes))
    keys = strata * (sizes.max(initial=0) + 1) + sizes
    # NumPy sorts 16-bit integers in linear time. Strata and sizes are small, unless there are large groups.
    keys = keys.astype(np.uint16) if keys.max(initial=0) < 1 << 16 else keys
    return shuffled[np.argsort(keys[shuffled], kind="stable")]


def _emptiest(room: np.ndarray, shares: np.ndarray, size: int, generator: np.random.Generator) -> int:
    """The part that lacks the largest share of its rows, among the parts that have room for `size` rows.

    If no part has room, the one with the most room. Ties are broken at random, in proportion to the parts' shares.
    """
    fits = room >= size
    if not fits.any():
        return int(room.argmax())
    lacking = np.where(fits, room / shares, -np.inf)
    best = np.flatnonzero(lacking >= lacking.max() * (1 - 1e-9))  # equal but for rounding
    return int(generator.choice(best, p=shares[best] / shares[best].sum()))


def _in_turn(n: int, room: np.ndarray) -> np.ndarray:
    """[n] parts, evenly interleaved in proportion to their room: any run of consecutive items has about these shares.

    One part after the other takes its items evenly from those that are left.
    """
    parts, left = np.full(n, len(room) - 1), np.arange(n)
    for part in range(len(room) - 1):
        share = room[part] / max(room[part:].sum(), 1e-9)  # 1e-9: no division by 0 if all parts are full
        counts = np.floor(np.arange(len(left) + 1) * share + 0.5)  # how many of the first i items the part gets
        is_drawn = np.diff(counts) > 0
        parts[left[is_drawn]] = part
        left = left[~is_drawn]
    return parts


def _check_share(validates: np.ndarray, wanted: float, sizes: np.ndarray) -> None:
    """Warns if the share of validation rows is far from the wanted one, because of large groups.

    Raises:
        DataError: no row validates, or no row trains.
    """
    share = float(validates.mean())
    if share in (0.0, 1.0):
        raise DataError(
            f"{len(validates)} rows in {len(sizes)} groups, the largest of {sizes.max()}, cannot be split so that "
            f"{wanted:.0%} of them validate",
            "add rows, or use another --val-fraction or fewer --folds",
        )
    if abs(share - wanted) > MAX_DEVIATION * wanted and sizes.max() > 1:
        reason = f"rows of a group stay together, and the largest has {sizes.max()} of {len(validates)}"
        log.warning(event="uneven_split", share=share, wanted=wanted, reason=reason)
