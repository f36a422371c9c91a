"""Which rows train and which validate: stratified by price or by date, near-duplicates on one side.

The split is the same for any order of the rows.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fusion import log
from fusion.config import RunConfig
from fusion.data.dates import moment, moments
from fusion.data.tables import Table
from fusion.errors import DataError

N_STRATA = 10
# A group with more than this share of the smallest part's rows is placed by itself: 20 of them would fill the part.
LARGE_SHARE = 0.05
# Share of the validating rows that may deviate, of that asked for; only large groups, or very few rows, make it more.
MAX_DEVIATION = 0.1


def split_rows(table: Table, groups: np.ndarray, config: RunConfig) -> pd.DataFrame:
    """Side of every row, the same for all rows of a group.

    Args:
        table: N rows with prices, sorted by id.
        groups: [N] as of `near_duplicate_groups`.

    Returns:
        One row per sample in the table's order: sample_id, price, group (int), side ("train", "validation" or, by date,
        "dropped").

    Raises:
        DataError: fewer groups than the split needs, a column of dates that cannot be used, or no row on one side.
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
    """All rows validate, each by the members that hold out its fold, a column of its own."""
    folds = _parts(table, groups, config)
    log.info(event="split", rows=len(folds), folds=" ".join(map(str, np.bincount(folds))), groups=int(groups.max() + 1))
    side = pd.array(["validation"] * len(folds), "str")
    return pd.DataFrame({"sample_id": table.ids, "price": table.prices, "group": groups, "side": side, "fold": folds})


def part_of(split: pd.DataFrame, held_out: int) -> np.ndarray:
    """[N] part of the split that each row is in: its fold; of a split by sides `held_out` for rows that validate.

    Rows that neither train nor validate are in part -1.
    """
    if "fold" in split:
        return split["fold"].to_numpy(np.int64)
    others = np.where(split["side"] == "train", int(held_out == 0), -1)
    return np.where(split["side"] == "validation", held_out, others)


def _sides(table: Table, groups: np.ndarray, config: RunConfig) -> np.ndarray:
    """[N] bool: the row validates."""
    shares, wanted = _shares(config)
    validates: np.ndarray = _parts(table, groups, config) == wanted
    _check_share(validates, shares[wanted], np.bincount(groups))
    return validates


def _parts(table: Table, groups: np.ndarray, config: RunConfig) -> np.ndarray:
    """[N] part of each row. Whole groups are drawn, so that the share of rows is as asked for."""
    shares, _ = _shares(config)
    sizes = np.bincount(groups)
    if len(sizes) < len(shares):
        raise DataError(
            f"{len(sizes)} groups of rows cannot be split into {len(shares)} parts; rows with the same text, vector or "
            "--group-column value stay together",
            "give more rows, or fewer --folds",
        )
    parts: np.ndarray = draw_parts(sizes, _strata(table, groups, shares), shares, config.seed)[groups]
    return parts


def _sides_by_date(table: Table, groups: np.ndarray, column: str, day: str) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool: the row is of that day or later and validates; [N] bool: it is earlier, and a near-duplicate of one.

    The latter neither train nor validate: what was learned of them would be known of rows that validate.
    """
    found = moments(table.column(column, "--validate-after"), "--validate-after").to_numpy("datetime64[us]")
    validates: np.ndarray = found >= moment(day)
    dropped: np.ndarray = np.isin(groups, groups[validates]) & ~validates
    if not validates.any() or (validates | dropped).all():
        missing = "validates" if not validates.any() else "trains"
        days = " to ".join(np.datetime_as_string([found.min(), found.max()], "D"))
        raise DataError(
            f"no row {missing}: the {len(found)} dates in {column!r} are {days}, --validate-after names {day}",
            "name a date between them with --validate-after",
        )
    return validates, dropped


def _shares(config: RunConfig) -> tuple[np.ndarray, int]:
    """Share of the rows of each part, and the part that validates."""
    if config.folds is not None:
        return np.full(config.folds, 1 / config.folds), config.fold or 0
    return np.array([config.val_fraction, 1 - config.val_fraction]), 0


def _strata(table: Table, groups: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[G] quantile of each group's median price, from 0; fewer of them where there are few groups."""
    prices = pd.Series(table.prices).groupby(groups).median().to_numpy()
    ranks = pd.Series(prices).rank(method="first").to_numpy() - 1
    n_strata = max(1, min(N_STRATA, int(len(prices) * shares.min())))
    return np.asarray(ranks * n_strata // len(prices), np.int64)


def draw_parts(sizes: np.ndarray, strata: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """[G] part of each group, so that each part gets its share of the rows of every stratum.

    Groups of more than a twentieth of the smallest part are placed first, the largest first, where most of a part's
    rows are still to come. All others go to the parts in turn, ordered by stratum and size and shuffled within.

    Args:
        sizes: [G] rows of each group.
        strata: [G] stratum of each group.
        shares: [P] share of the rows of each part; they add up to 1.
    """
    generator = np.random.default_rng(seed)
    parts = np.zeros(len(sizes), np.int64)
    room = shares * sizes.sum()
    large = sizes > max(1, LARGE_SHARE * room.min())
    for group in sorted(np.flatnonzero(large), key=lambda one: (-sizes[one], one)):
        parts[group] = _emptiest(room, shares, int(sizes[group]), generator)
        room[parts[group]] -= sizes[group]
    small = np.flatnonzero(~large)
    order = small[np.lexsort((generator.permutation(len(small)), sizes[small], strata[small]))]
    parts[order] = _in_turn(len(order), np.maximum(room, 0))
    return parts


def _emptiest(room: np.ndarray, shares: np.ndarray, size: int, generator: np.random.Generator) -> int:
    """The part that lacks the largest share of its rows, of those that `size` rows fit into; else the roomiest."""
    fits = room >= size
    if not fits.any():
        return int(room.argmax())
    lacking = np.where(fits, room / shares, -np.inf)
    best = np.flatnonzero(lacking >= lacking.max() * (1 - 1e-9))
    return int(generator.choice(best, p=shares[best] / shares[best].sum()))


def _in_turn(n: int, room: np.ndarray) -> np.ndarray:
    """[n] parts in proportion to their room, evenly interleaved: of any consecutive ones each part has its share."""
    parts, left = np.full(n, len(room) - 1), np.arange(n)
    for part in range(len(room) - 1):
        share = room[part] / max(room[part:].sum(), 1e-9)
        counts = np.floor(np.arange(len(left) + 1) * share + 0.5)  # how many of the first ones it gets
        is_drawn = np.diff(counts) > 0
        parts[left[is_drawn]] = part
        left = left[~is_drawn]
    return parts


def _check_share(validates: np.ndarray, wanted: float, sizes: np.ndarray) -> None:
    """Warns when large groups keep the share of the validating rows from what was asked for.

    Raises:
        DataError: no row validates, or none trains.
    """
    share = float(validates.mean())
    if share in (0.0, 1.0):
        raise DataError(
            f"{len(validates)} rows in {len(sizes)} groups, the largest of {sizes.max()}, cannot be split so that "
            f"{wanted:.0%} of them validate",
            "give more rows, another --val-fraction or fewer --folds",
        )
    if abs(share - wanted) > MAX_DEVIATION * wanted and sizes.max() > 1:
        reason = f"rows of a group stay together, and the largest has {sizes.max()} of {len(validates)}"
        log.warning(event="uneven_split", share=share, wanted=wanted, reason=reason)
