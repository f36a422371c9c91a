"""Guards: checks that decide whether the embeddings and prices of a night are plausible enough to be published.

Embeddings are checked before prices are predicted. They are compared with those that the model was trained on, which
is possible on the very first night, and with those of the last submission. Predicted prices are compared with the last
submission and with the training prices. Each check has two limits: above the lower one (DOUBTED) the log has a warning,
above the higher one (REFUSED) nothing is published unless --force is given.

The comments below give the measurements that each limit was chosen from; `benchmarks/nights.py` repeats them on any
data. "Test rows" are the correct embeddings of `test.csv`.
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
from fusion.submissions.fingerprints import EmbeddingStatistics, agreements_with_chance, compared
from fusion.submissions.submission import LastSubmission, Origin

# With fewer rows, distributions are not checked: the mean of 50 rows is off by 0.14 standard deviations by chance.
MIN_ROWS = 50
# Variance divided by that of the training rows, or the inverse if that is larger. Measured variances: test rows 0.92 to
# 1.01; a single category 0.67 to 1.22; all vectors halved 0.25; zeros, or one vector for all rows, 0; the vectors of
# two image encoders rotated at random 1.9 and 4.3.
SPREAD_REFUSED, SPREAD_DOUBTED = 2.5, 1.6
# Shift of the mean in standard deviations of the training rows, see `EmbeddingStatistics`. Measured: test rows 0.03; a
# single category up to 0.53; another encoder of the same dimension 1.2 to 2.7.
SHIFT_REFUSED, SHIFT_DOUBTED = 0.8, 0.4
# Agreement of two sources (see `fingerprints.agreements`), divided by that in training; lower is worse. Measured: test
# rows 0.93 to 1.13; a single category at least 0.71; half of the rows under wrong ids 0.25; one source entirely under
# shuffled ids at most 0.05.
AGREEMENT_REFUSED, AGREEMENT_DOUBTED = 0.2, 0.5
# The agreement of a pair is checked only if shuffled rows reach less than this share of the agreement in training;
# otherwise the pair is related too weakly, or has too few rows, to notice wrong ids.
CHANCE_ALLOWED = 0.2
# Share of known products that now have the vector of another product. In correct data this happens only when products
# swap their photos. Up to MOVED_ALLOWED products never count as unusual, so that a small catalog is not refused for a
# single swap.
MOVED_REFUSED, MOVED_DOUBTED, MOVED_ALLOWED = 0.02, 0.002, 3
# Share of known products with a vector that no product had. If the model is the same, more than half of a catalog does
# not get new photos or texts in one night: the vectors come from another encoder.
NEW_REFUSED, NEW_DOUBTED = 0.5, 0.25
# Change of the prices of known products, divided by the change that shuffling all prices would cause. Measured: both
# texts under wrong ids 0.7; both images 0.57; 20% of the products replaced 0.18; a second training with another seed
# 0.34; both of the latter 0.44. Half of these limits gives a warning.
CHANGE_SAME_MODEL, CHANGE_OTHER_MODEL = 0.4, 0.6
# A warning follows if at least UNUSUAL_NIGHTS earlier nights used the same model, and this night changes prices by more
# than UNUSUAL_FACTOR times the largest of their changes. Changes of up to UNUSUAL_CHANGE % are never unusual. The three
# are judgements: a false warning costs a look at the log.
UNUSUAL_FACTOR, UNUSUAL_NIGHTS, UNUSUAL_CHANGE = 3.0, 5, 1.0
# Ratio of the 75% to the 25% quantile below which all prices count as equal. In any real catalog it is far larger.
FLAT = 1.01
# The log notes when prices have moved by more than this factor (up or down) over the remembered nights. It refuses
# nothing: it makes a slow drift visible that no single night shows.
MOVED_PRICES = 1.05
MOST_SAID = 3  # anomalies that an error message names, to stay readable; the log has all of them


@dataclass(frozen=True)
class Anomaly:
    """Something unusual about a night.

    Attributes:
        what: description for the log and the error message.
        refused: True if nothing may be published because of it; False if it only causes a warning.
    """

    what: str
    refused: bool


def conclude(settings: PredictConfig, anomalies: Iterable[Anomaly]) -> None:
    """Logs all anomalies, and refuses to publish if one of them demands it.

    Raises:
        DataError: at least one anomaly is `refused`, and --force was not given. The last submission stays current.
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


def about_embeddings(
    statistics: EmbeddingStatistics, trained: Mapping[str, float], last: LastSubmission | None, origin: Origin
) -> Iterator[Anomaly]:
    """Checks the embeddings of a night; yields what is unusual.

    Args:
        statistics: fingerprints and moments of the night's embeddings.
        trained: agreement of each pair of roles on the training rows; empty for runs of earlier versions.
        last: the submission that is current; None on the first night.
        origin: what the new submission is made from.
    """
    if last is not None and last.prints is not None:
        same_model = last.manifest.model_sha256 == origin.model_sha256
        for role in statistics.prints.columns.intersection(last.prints.columns):
            yield from _about_ids(role, last.prints[role], statistics.prints[role], same_model)
    yield from _about_agreement(statistics.prints, trained)
    for role in statistics.prints.columns:
        if int((statistics.prints[role] > 0).sum()) >= MIN_ROWS:
            yield from _about_distribution(role, statistics.shift[role], statistics.spread[role])


def _about_distribution(role: str, shift: float, spread: float) -> Iterator[Anomaly]:
    """Compares mean and variance of a role with those of the training rows."""
    log.info(event="looked", role=role, shift=shift, spread=spread)
    factor = max(spread, 1 / max(spread, 1e-9))  # a variance of 0 gives a large factor instead of a division by 0
    if factor > SPREAD_DOUBTED or shift > SHIFT_DOUBTED:
        what = (
            f"embeddings of {role} differ from those of the training: their variance is {spread:.2f} times that of the "
            f"training, their mean is {shift:.2f} standard deviations away (perhaps they are of another encoder, scale "
            "or kind of product)"
        )
        yield Anomaly(what, factor > SPREAD_REFUSED or shift > SHIFT_REFUSED)


def _about_agreement(prints: pd.DataFrame, trained: Mapping[str, float]) -> Iterator[Anomaly]:
    """Compares the agreement of each pair of roles with that in training."""
    shares = {}
    for pair, (measured, chance) in agreements_with_chance(prints).items():
        expected = trained.get(pair, 0.0)
        if chance < CHANCE_ALLOWED * expected and measured < AGREEMENT_DOUBTED * expected:
            shares[pair.replace(" ", " and ")] = measured / expected
    if shares:
        what = (
            f"embeddings of {', of '.join(shares)} do not belong together as in training: their agreement is "
            f"{min(shares.values()):.0%} of that in training (one of the two is probably under wrong ids)"
        )
        yield Anomaly(what, min(shares.values()) < AGREEMENT_REFUSED)


def _about_ids(role: str, before: pd.Series, now: pd.Series, same_model: bool) -> Iterator[Anomaly]:
    """Compares the fingerprints of a role with those of the last submission."""
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
            + (", although the model is the same" if same_model else "")
        )
        yield Anomaly(what, same_model and found.new > NEW_REFUSED * found.known)


def about_prices(
    settings: PredictConfig, prices: pd.Series, smape: float, last: LastSubmission | None, origin: Origin
) -> Iterator[Anomaly]:
    """Checks the prices of a night; yields what is unusual.

    Args:
        prices: dollars, indexed by sample_id.
        smape: of the model on its validation rows, in %.
        last: the submission that is current; None on the first night.
        origin: what the new submission is made from.
    """
    if len(prices) >= MIN_ROWS and prices.quantile(0.75) < FLAT * prices.quantile(0.25):
        what = f"all products get practically the same price, {readable(prices.median())}"
        yield Anomaly(f"{what}: the model or the embeddings do not distinguish them", True)
    if last is not None:
        yield from _against_last(settings, prices, smape, last, origin)
    yield from _against_training(settings, prices, RunFolder(origin.run))


def _against_last(
    settings: PredictConfig, prices: pd.Series, smape: float, last: LastSubmission, origin: Origin
) -> Iterator[Anomaly]:
    """Compares number of rows, prices of known products and quartiles with the last submission."""
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
    """SMAPE, in %, between the prices of the products that both submissions have; None if they share no product."""
    then, now = _common(before, prices)
    return compute_smape(then, now) if len(now) else None


def _common(before: pd.Series, prices: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """[M] former prices and [M] new prices of the products that have both."""
    positions = positions_of(prices.index, before.index)  # in `before`; -1 for an id that it does not have
    is_known = positions >= 0
    return before.to_numpy()[positions[is_known]], prices.to_numpy()[is_known]


def largest_change(before: pd.Series, same_model: bool, smape: float, smape_before: float | None) -> float:
    """The largest change of prices, as SMAPE in %, that is plausible with correct embeddings.

    If embeddings are under wrong ids, a price differs from the former one as the prices of two random products do.
    Shuffling the former prices measures that difference, and the limit is a share of it, so that it adapts to how much
    the prices of a catalog vary. With another model, the limit is also at most the sum of both models' errors: if they
    are independent, the squares add up, hence `hypot`.

    Args:
        before: prices of the last submission.
        smape, smape_before: of the new and the former model on their validation rows, in %.
    """
    shuffled = compute_smape(before.to_numpy(), np.random.default_rng(0).permutation(before.to_numpy()))
    if same_model:
        return CHANGE_SAME_MODEL * shuffled
    limit = CHANGE_OTHER_MODEL * shuffled
    return limit if smape_before is None else min(limit, math.hypot(smape, smape_before))


def _about_change(change: float, limit: float, nights: Sequence[Night], model_sha256: str) -> Iterator[Anomaly]:
    """Compares the change of known prices with the limit, and with the changes of earlier nights of the same model."""
    what = f"prices of known products differ by {change:.1f}% (SMAPE) from the last submission's"
    if change > limit / 2:
        yield Anomaly(
            f"{what}: embeddings under wrong ids, or another model (--max-change {limit:.3g})", change > limit
        )
        return
    usual = [night.change for night in nights if night.model_sha256 == model_sha256]
    if len(usual) >= UNUSUAL_NIGHTS and change > max(UNUSUAL_CHANGE, UNUSUAL_FACTOR * max(usual)):
        yield Anomaly(f"{what}, in {len(usual)} nights before by at most {max(usual):.1f}%", False)


def remembered(prices: pd.Series, last: LastSubmission | None, day: str, model_sha256: str) -> list[Night]:
    """The nights to store in the new submission, oldest first: those of the last submission, and this one.

    Logs it if prices have moved by more than `MOVED_PRICES` over these nights.
    """
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
    """Compares the quartiles with those of the training prices."""
    facts = run.facts()
    if facts and facts.price_quartiles:  # runs of earlier versions have none
        limit = settings.max_training_drift
        yield from _drift(prices, facts.price_quartiles, limit, "the training prices'", "--max-training-drift")


def _drift(prices: pd.Series, expected: Sequence[float], limit: float, whose: str, flag: str) -> Iterator[Anomaly]:
    """Compares the three quartiles with the expected ones; `limit` is the largest allowed factor between them.

    Args:
        whose: the expected quartiles in words, as a possessive; it ends up in the message.
        flag: the flag that sets the limit.
    """
    for quantile, now, then in zip((25, 50, 75), _quartiles(prices), expected, strict=True):
        if max(now / then, then / now) > limit:
            yield Anomaly(
                f"the {quantile}% quantile is {readable(now)}, {whose} {readable(then)} ({flag} {limit:g})", True
            )


def _quartiles(prices: pd.Series) -> list[float]:
    return [float(value) for value in prices.quantile([0.25, 0.5, 0.75])]
