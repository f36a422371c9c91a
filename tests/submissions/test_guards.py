"""Guards refuse implausible embeddings and prices, and let usual nights pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion.config import PredictConfig
from fusion.errors import DataError
from fusion.records.schemas import Night, SubmissionManifest
from fusion.submissions import guards
from fusion.submissions.fingerprints import EmbeddingStatistics
from fusion.submissions.guards import Anomaly
from fusion.submissions.submission import LastSubmission, Origin

N = 400
MODEL, OTHER = "a" * 64, "b" * 64
IDS = pd.Index([f"id{number}" for number in range(N)])
RNG = np.random.default_rng(0)


def origin(model: str = MODEL, run: str = "nowhere/runs/r") -> Origin:
    return Origin(run, "step-1", model, "data", "c" * 64, "d" * 64, "e" * 64)


def prices(seed: int = 0, spread: float = 0.8) -> pd.Series:
    return pd.Series(np.random.default_rng(seed).lognormal(3, spread, N), IDS)


def changed(before: pd.Series, noise: float) -> pd.Series:
    """Prices of another model: each off by a factor."""
    return before * np.exp(noise * np.random.default_rng(1).standard_normal(len(before)))


def last(before: pd.Series, prints: pd.DataFrame | None = None, history: list[Night] | None = None) -> LastSubmission:
    facts = {"rows": len(before), "date": "2026-03-01", "run": "r", "checkpoint": "c", "smape": 40.0}
    manifest = SubmissionManifest(schema=1, files=[], model_sha256=MODEL, history=history or [], **facts)  # type: ignore[arg-type]
    return LastSubmission(manifest, before, prints)


def verdicts(now: pd.Series, before: LastSubmission, model: str = MODEL, **settings: object) -> dict[str, bool]:
    chosen = PredictConfig(**settings)  # type: ignore[arg-type]
    return {one.what: one.refused for one in guards.about_prices(chosen, now, 40.0, before, origin(model))}


def shuffled(values: pd.Series, share: float = 1.0) -> pd.Series:
    """The values of a share of the rows under the ids of others among these."""
    rows = RNG.permutation(len(values))[: round(share * len(values))]
    result = values.to_numpy().copy()
    result[rows] = result[np.roll(rows, 1)]
    return pd.Series(result, values.index)


@pytest.mark.parametrize("spread", [0.1, 0.8])
@pytest.mark.parametrize("model", [MODEL, OTHER])
def test_prices_under_wrong_ids_are_refused_for_any_spread_of_prices(model: str, spread: float) -> None:
    before = prices(spread=spread)
    assert list(verdicts(shuffled(before), last(before), model).values()) == [True]


def test_unchanged_prices_and_a_fifth_of_new_products_pass() -> None:
    before = prices()
    assert verdicts(before, last(before)) == {}
    assert verdicts(shuffled(before, 0.15), last(before)) == {}


def test_half_the_limit_gives_a_warning() -> None:
    before = prices()
    assert list(verdicts(shuffled(before, 0.3), last(before)).values()) == [False]


def test_another_model_may_change_prices_more_than_the_same() -> None:
    before = prices()
    now = changed(before, 0.6)
    assert list(verdicts(now, last(before)).values()) == [True]
    assert list(verdicts(now, last(before), OTHER).values()) == [False]


def test_two_good_models_are_close_to_each_other() -> None:
    before, now = prices(), changed(prices(), 0.3)
    assert guards.largest_change(before, False, 40.0, 40.0) > guards.largest_change(before, False, 8.0, 8.0)
    good = guards.largest_change(before, False, 8.0, 8.0)
    assert good == pytest.approx(8 * 2**0.5) and (guards.change_of(now, before) or 0) > good


def test_the_limit_can_be_given() -> None:
    before = prices()
    assert list(verdicts(shuffled(before), last(before), max_change=120.0).values()) == [False]
    (what,) = verdicts(shuffled(before, 0.3), last(before), max_change=10.0)
    assert what.endswith("(--max-change 10)")


def test_a_change_larger_than_on_earlier_nights_gives_a_warning() -> None:
    before = prices()
    quiet = [Night(f"2026-02-{day:02}", MODEL, 0.2, 1.0) for day in range(1, 8)]
    assert verdicts(shuffled(before, 0.08), last(before)) == {}
    ((what, refused),) = verdicts(shuffled(before, 0.08), last(before, history=quiet)).items()
    assert "in 7 nights before by at most 0.2%" in what and not refused


def test_one_price_for_all_is_refused() -> None:
    flat = pd.Series(np.full(N, 19.99), IDS) * np.linspace(1, 1.001, N)
    found = list(guards.about_prices(PredictConfig(), flat, 0.1, None, origin()))
    assert [one.refused for one in found] == [True] and "practically the same price, 20.00" in found[0].what


def test_missing_rows_are_refused() -> None:
    before = prices()
    assert "300 rows, the last submission has 400 (--min-rows 0.8)" in verdicts(before[:300], last(before))


def test_a_slow_drift_of_prices_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    before, history = prices(), list[Night]()
    for day in range(1, 31):
        now = before * 1.1 ** (1 / 30)
        assert verdicts(now, last(before, history=history), OTHER) == {}
        history = guards.remembered(now, last(before, history=history), f"2026-03-{day:02}", OTHER)
        before = now
    assert len(history) == 30 and "event=prices_moved factor=1.1 since=2026-03-01 nights=30" in capsys.readouterr().err


def test_at_most_thirty_nights_are_stored() -> None:
    before = prices()
    history = [Night("2026-02-01", MODEL, 0.0, 1.0)] * 30
    found = guards.remembered(before, last(before, history=history), "2026-03-02", MODEL)
    assert len(found) == 30 and found[-1].date == "2026-03-02"


def prints(seed: int = 0) -> pd.DataFrame:
    """Two sources that agree on half of their bits."""
    rng = np.random.default_rng(seed)
    first, second = (rng.integers(1, 2**63, N, np.uint64) for _ in range(2))
    return pd.DataFrame(
        {"image": first, "text": (first & np.uint64(2**32 - 1)) | (second & ~np.uint64(2**32 - 1))}, IDS
    )


def about(now: pd.DataFrame, before: pd.DataFrame | None = None, model: str = MODEL, **moments: float) -> list[Anomaly]:
    shift, spread = (
        {role: moments.get(name, usual) for role in now} for name, usual in (("shift", 0.0), ("spread", 1.0))
    )
    earlier = None if before is None else last(prices(), before)
    return list(
        guards.about_embeddings(EmbeddingStatistics(now, shift, spread), {"image text": 0.25}, earlier, origin(model))
    )


def test_usual_embeddings_pass() -> None:
    assert about(prints()) == [] == about(prints(), prints())


@pytest.mark.parametrize(
    ("moments", "refused"),
    [
        ({"shift": 0.5}, False),
        ({"shift": 1.2}, True),
        ({"spread": 1.9}, False),
        ({"spread": 0.25}, True),
        ({"spread": 0.0}, True),
    ],
)
def test_embeddings_of_another_distribution_are_refused_on_the_first_night(
    moments: dict[str, float], refused: bool
) -> None:
    assert [one.refused for one in about(prints(), **moments)] == [refused, refused], "one anomaly per role"
    assert about(prints()[:40], **moments) == [], "too few rows for a distribution"


def test_a_source_under_other_ids_is_refused_on_the_first_night() -> None:
    now = prints()
    (found,) = about(now.assign(image=shuffled(now["image"])))
    assert found.refused and "image and text do not belong together" in found.what


def test_all_sources_under_other_ids_are_refused_on_the_second_night() -> None:
    now = prints()
    order = np.random.default_rng(3).permutation(N)
    found = about(pd.DataFrame(now.to_numpy()[order], IDS, now.columns), now)
    assert [one.refused for one in found] == [True, True] and "that another one had" in found[0].what
    assert all(one.refused for one in about(now.iloc[order].set_axis(IDS), now, OTHER)), (
        "refused also if the model has changed"
    )


def test_two_products_may_swap_their_photos() -> None:
    now = prints()
    swapped = now.copy()
    swapped.iloc[[0, 1], 0] = now.iloc[[1, 0], 0].to_numpy()
    assert about(swapped, now) == []
    (found,) = about(now.assign(image=shuffled(now["image"], 0.015)), now)
    assert not found.refused


def test_vectors_of_another_encoder_are_refused_with_the_same_model() -> None:
    found = about(prints(7), prints())
    assert [one.refused for one in found] == [True, True] and found[0].what.endswith("although the model is the same")
    assert [one.refused for one in about(prints(7), prints(), OTHER)] == [False, False]


def test_new_content_of_a_fifth_of_the_products_passes() -> None:
    now = prints()
    now.iloc[:80] = prints(7).iloc[:80].to_numpy()
    assert about(now, prints()) == []


def test_force_publishes_and_logs_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    anomalies = [Anomaly("one is odd", False), *(Anomaly(f"{number} is wrong", True) for number in range(2, 7))]
    with pytest.raises(DataError, match="not published: 2 is wrong; 3 is wrong; 4 is wrong; and 2 more, see the log"):
        guards.conclude(PredictConfig(), anomalies)
    capsys.readouterr()
    guards.conclude(PredictConfig(force=True), anomalies)
    said = capsys.readouterr().err
    assert 'event=doubtful reason="one is odd"' in said and 'event=wrong reason="6 is wrong"' in said
    assert "event=forced reasons=5" in said


def test_prices_far_from_the_training_prices_are_refused(tmp_path: Path) -> None:
    digests = dict.fromkeys(("config_sha256", "data_sha256"), "a" * 64)
    quartiles = [value * 5 for value in prices().quantile([0.25, 0.5, 0.75])]
    facts = pd.Series({"run_id": "r", "variant": "v", "dims": {}, "price_quartiles": quartiles} | digests)
    (tmp_path / "run.json").write_text(facts.to_json())
    found = list(guards.about_prices(PredictConfig(), prices(), 40.0, None, origin(run=str(tmp_path))))
    assert [one.refused for one in found] == [True] * 3 and "the training prices'" in found[0].what


def test_tiny_prices_are_shown_with_significant_digits() -> None:
    before, now = pd.Series(2e-4, IDS) * np.linspace(1, 2, N), pd.Series(8e-4, IDS) * np.linspace(1, 2, N)
    said = " ".join(verdicts(now, last(before)))
    assert "the 50% quantile is 0.0012, the last submission's 0.0003" in said
    assert "practically the same price, 0.00012" in " ".join(verdicts(pd.Series(1.23e-4, IDS), last(before)))
