"""Whether a night's embeddings and prices may be published, judged by what is known of the model and of earlier nights.

Embeddings are looked at before anything is priced: against those that the model was trained on, which works on the very
first night, and against those of the last submission. Prices are compared afterwards. Each limit stands below with the
figures it comes from: `benchmarks/nights.py` measures them on any data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fusion import log
from fusion.config import PredictConfig
from fusion.data.tables import positions_of
from fusion.errors import DataError
from fusion.metrics import compute_smape, readable
from fusion.records import schemas
from fusion.records.run import RunFolder
from fusion.records.schemas import Night
from fusion.submissions.fingerprints import Look, agreements_with_chance, compared
from fusion.submissions.submission import Last, Origin

# Fewer rows than this have no distribution worth the name: means of 50 rows are off by 0.14 deviations by chance alone.
MIN_ROWS = 50
# Variance as a multiple of the training rows'. Test rows: 0.92 to 1.01; a single category: 0.67 to 1.22; a source that
# was halved: 0.25; one of zeros or of one vector: 0; two image encoders rotated at random: 1.9 and 4.3.
SPREAD_REFUSED, SPREAD_DOUBTED = 2.5, 1.6
# Root mean square of the mean, in deviations of the training rows. Test rows: 0.03; a single category: up to 0.53;
# another encoder of the same dimension: 1.2 to 2.7.
SHIFT_REFUSED, SHIFT_DOUBTED = 0.8, 0.4
# Agreement of two sources as a share of that in training. Test rows: 0.93 to 1.13; a single category: at least 0.71;
# one source under shuffled ids: at most 0.05. With half of the rows under wrong ids it is 0.25.
AGREEMENT_REFUSED, AGREEMENT_DOUBTED = 0.2, 0.5
# An agreement is only judged where shuffled rows reach less than this share of what is expected.
CHANCE_ALLOWED = 0.2
# Share of known products whose vector another one had. Honest nights have hardly any: two products swap their photos.
MOVED_REFUSED, MOVED_DOUBTED, MOVED_ALLOWED = 0.02, 0.002, 3
# Share of known products whose vector no one had. With the same model, most of a catalog cannot have new photos or
# texts: it was encoded by something else.
NEW_REFUSED, NEW_DOUBTED = 0.5, 0.25
# Change of the prices of known products, as a share of what shuffling all prices would change: 0.7 with both texts
# under wrong ids, 0.57 with both images; 0.18 with 20% of the products replaced; 0.34 for two trainings with
# other seeds, 0.44 with both. Half of it is worth a look.
CHANGE_SAME_MODEL, CHANGE_OTHER_MODEL = 0.4, 0.6
# A night that changes prices by more than three times the largest change of at least five nights is worth a look.
UNUSUAL_FACTOR, UNUSUAL_NIGHTS, UNUSUAL_CHANGE = 3.0, 5, 1.0
# The quartiles of any catalog are further apart: this model tells no product from another.
FLAT = 1.01
MOVED_PRICES = 1.05  # factor over the nights remembered from which the log notes it
MOST_SAID = 3  # anomalies in an error; the log has them all


@dataclass(frozen=True)
class Anomaly:
    """Something unusual about a night; `refused`: enough to publish nothing."""

    what: str
    refused: bool


def conclude(settings: PredictConfig, anomalies: Iterable[Anomaly]) -> None:
    """Warns of what is doubtful.

    Raises:
        DataError: something is wrong, and --force was not given. The last submission stays current.
    """
    found = list(anomalies)
    for anomaly in found:
        log.warning(event="wrong" if anomaly.refused else "doubtful", reason=anomaly.what)
    wrong = [anomaly.what for anomaly in found if anomaly.refused]
    if wrong and settings.force:
        log.warning(event="forced", reasons=len(wrong))
    elif wrong:
        more = f"; and {len(wrong) - MOST_SAID} more, see the log" if len(wrong) > MOST_SAID else ""
        raise DataError(
            f"not published: {'; '.join(wrong[:MOST_SAID])}{more}",
            "look for the cause in the embeddings and test.csv; if it is right, publish it with --force",
        )


def about_embeddings(look: Look, trained: Mapping[str, float], last: Last | None, origin: Origin) -> Iterator[Anomaly]:
    """What is unusual about a night's embeddings.

    Args:
        trained: agreement of each pair of roles on the training rows; empty for runs of earlier versions.
    """
    if last is not None and last.prints is not None:
        same_model = last.manifest.model_sha256 == origin.model_sha256
        for role in look.prints.columns.intersection(last.prints.columns):
            yield from _about_ids(role, last.prints[role], look.prints[role], same_model)
    yield from _about_agreement(look.prints, trained)
    for role in look.prints.columns:
        if int((look.prints[role] > 0).sum()) >= MIN_ROWS:
            yield from _about_distribution(role, look.shift[role], look.spread[role])


def _about_distribution(role: str, shift: float, spread: float) -> Iterator[Anomaly]:
    log.info(event="looked", role=role, shift=shift, spread=spread)
    factor = max(spread, 1 / max(spread, 1e-9))
    if factor > SPREAD_DOUBTED or shift > SHIFT_DOUBTED:
        what = (
            f"embeddings of {role} are not like those of the training: variance {spread:.2f} times theirs, mean "
            f"{shift:.2f} deviations away (another encoder, another scale, or another kind of product)"
        )
        yield Anomaly(what, factor > SPREAD_REFUSED or shift > SHIFT_REFUSED)


def _about_agreement(prints: pd.DataFrame, trained: Mapping[str, float]) -> Iterator[Anomaly]:
    shares = {}
    for pair, (measured, chance) in agreements_with_chance(prints).items():
        expected = trained.get(pair, 0.0)
        if chance < CHANCE_ALLOWED * expected and measured < AGREEMENT_DOUBTED * expected:
            shares[pair.replace(" ", " and ")] = measured / expected
    if shares:
        what = (
            f"embeddings of {', of '.join(shares)} do not belong together as in training: their agreement is "
            f"{min(shares.values()):.0%} of what it was there (one of the two is under wrong ids)"
        )
        yield Anomaly(what, min(shares.values()) < AGREEMENT_REFUSED)


def _about_ids(role: str, before: pd.Series, now: pd.Series, same_model: bool) -> Iterator[Anomaly]:
    found = compared(before, now)
    log.info(event="vectors_compared", role=role, known=found.known, moved=found.moved, new=found.new)
    if found.moved > max(MOVED_ALLOWED, MOVED_DOUBTED * found.known):
        what = (
            f"{found.moved} of {found.known} known products have the {role} embedding that another one had in the last "
            "submission (ids and vectors in different orders)"
        )
        yield Anomaly(what, found.moved > MOVED_REFUSED * found.known)
    if found.new > max(MOVED_ALLOWED, NEW_DOUBTED * found.known):
        what = (
            f"{found.new} of {found.known} known products have another {role} embedding than in the last submission"
            + (", with the same model" if same_model else "")
        )
        yield Anomaly(what, same_model and found.new > NEW_REFUSED * found.known)


def about_prices(
    settings: PredictConfig, prices: pd.Series, smape: float, last: Last | None, origin: Origin
) -> Iterator[Anomaly]:
    """What is unusual about a night's prices, by sample_id.

    Args:
        smape: of the model on its validation rows.
    """
    if len(prices) >= MIN_ROWS and prices.quantile(0.75) < FLAT * prices.quantile(0.25):
        what = f"all products get practically the same price, {readable(prices.median())}"
        yield Anomaly(f"{what}: the model, or the embeddings, tell them not apart", True)
    if last is not None:
        yield from _against_last(settings, prices, smape, last, origin)
    yield from _against_training(settings, prices, RunFolder(origin.run))


def _against_last(
    settings: PredictConfig, prices: pd.Series, smape: float, last: Last, origin: Origin
) -> Iterator[Anomaly]:
    if len(prices) < settings.min_rows * len(last.prices):
        what = f"{len(prices)} rows, the last submission has {len(last.prices)} (--min-rows {settings.min_rows})"
        yield Anomaly(what, True)
    change = change_of(prices, last.prices)
    if change is not None:
        same_model = last.manifest.model_sha256 == origin.model_sha256
        limit = settings.max_change
        if limit is None:
            limit = largest_change(last.prices, same_model, smape, last.manifest.smape)
        log.info(event="compared", change=change, max_change=limit, same_model=same_model)
        yield from _about_change(change, limit, last.manifest.history, origin.model_sha256)
    yield from _drift(prices, _quartiles(last.prices), settings.max_drift, "the last submission's", "--max-drift")


def change_of(prices: pd.Series, before: pd.Series) -> float | None:
    """SMAPE, in %, between the prices of the products that both have; None if there is none."""
    then, now = _common(before, prices)
    return compute_smape(then, now) if len(now) else None


def _common(before: pd.Series, prices: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """[M] former and present prices of the products that have both."""
    places = positions_of(prices.index, before.index)
    return before.to_numpy()[places[places >= 0]], prices.to_numpy()[places >= 0]


def largest_change(before: pd.Series, same_model: bool, smape: float, smape_before: float | None) -> float:
    """The largest SMAPE, in %, that honest embeddings should bring about.

    Prices under wrong ids are as far from the former ones as any two products' prices are: that is measured by
    shuffling them, so the limit follows how widely a model's prices spread. Two models differ by no more than
    their errors together, which add up as the sides of a right angle where they are independent.
    """
    shuffled = compute_smape(before.to_numpy(), np.random.default_rng(0).permutation(before.to_numpy()))
    if same_model:
        return CHANGE_SAME_MODEL * shuffled
    limit = CHANGE_OTHER_MODEL * shuffled
    return limit if smape_before is None else min(limit, math.hypot(smape, smape_before))


def _about_change(change: float, limit: float, nights: Sequence[Night], model_sha256: str) -> Iterator[Anomaly]:
    what = f"prices of known products differ by {change:.1f}% (SMAPE) from the last submission's"
    if change > limit / 2:
        yield Anomaly(
            f"{what}: embeddings under other ids, or another model (--max-change {limit:.3g})", change > limit
        )
        return
    usual = [night.change for night in nights if night.model_sha256 == model_sha256]
    if len(usual) >= UNUSUAL_NIGHTS and change > max(UNUSUAL_CHANGE, UNUSUAL_FACTOR * max(usual)):
        yield Anomaly(f"{what}, in {len(usual)} nights before by at most {max(usual):.1f}%", False)


def remembered(prices: pd.Series, last: Last | None, day: str, model_sha256: str) -> list[Night]:
    """The nights that the next one is compared with: the last submission's, and this one."""
    if last is None:
        return []
    change = change_of(prices, last.prices)
    if change is None:
        return last.manifest.history
    then, now = _common(last.prices, prices)
    factor = float(np.median(now / then))
    nights = [*last.manifest.history, Night(day, model_sha256, change, factor)][-schemas.MAX_NIGHTS :]
    moved = math.prod(night.factor for night in nights)
    if max(moved, 1 / moved) > MOVED_PRICES:
        log.info(event="prices_moved", factor=moved, since=nights[0].date, nights=len(nights))
    return nights


def _against_training(settings: PredictConfig, prices: pd.Series, run: RunFolder) -> Iterator[Anomaly]:
    facts = run.facts()
    if facts and facts.price_quartiles:  # runs of earlier versions have none
        limit = settings.max_training_drift
        yield from _drift(prices, facts.price_quartiles, limit, "the training prices'", "--max-training-drift")


def _drift(prices: pd.Series, expected: Sequence[float], limit: float, whose: str, flag: str) -> Iterator[Anomaly]:
    for quantile, now, then in zip((25, 50, 75), _quartiles(prices), expected, strict=True):
        if max(now / then, then / now) > limit:
            yield Anomaly(
                f"the {quantile}% quantile is {readable(now)}, {whose} {readable(then)} ({flag} {limit:g})", True
            )


def _quartiles(prices: pd.Series) -> list[float]:
    return [float(value) for value in prices.quantile([0.25, 0.5, 0.75])]
