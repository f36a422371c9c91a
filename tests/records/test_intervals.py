"""Intervals cover as many prices as they state: overall, by tier, by category, and for rows that were not fitted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, norm

from fusion import storage
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.data.tables import read_table
from fusion.errors import DataError
from fusion.records import manifests
from fusion.records.intervals import (
    LEVELS,
    _has_own_bin,
    bounds,
    category_of,
    coverage,
    crossed,
    fit,
    intervals_of,
    is_within,
    tier_names,
)
from fusion.records.run import RunFolder
from fusion.records.schemas import Intervals, parse, seal
from fusion.records.validation import validation_of
from fusion.verify.__main__ import verify
from tests.conftest import SMALL
from tests.documents import edit

GROUPS = ("plain", "exact", "wild")


def rows(n: int, seed: int = 0, *, spread: bool = True) -> pd.DataFrame:
    """Log errors whose size depends on the category, on the predicted price and on the spread."""
    rng = np.random.default_rng(seed)
    predicted, noise = rng.lognormal(3, 1, n), rng.uniform(0.05, 1, n)
    category = rng.choice([*GROUPS, "rare"], n, p=[0.6, 0.2, 0.19, 0.01])
    size = pd.Series(category).map({"plain": 1.0, "exact": 0.2, "wild": 2.0, "rare": 1.0}).to_numpy()
    error = 0.4 * size * noise * np.where(predicted > 30, 2, 1) * rng.standard_normal(n)
    frame = pd.DataFrame({"price": predicted * np.exp(error), "predicted": predicted, "category": category})
    return frame.assign(spread=noise) if spread else frame


def made_of(frame: pd.DataFrame, by: str = "kind") -> Intervals:
    found = fit(frame, by)
    assert found is not None
    return found


@pytest.mark.parametrize("spread", [True, False])
def test_coverage_of_new_rows_matches_the_level_in_every_bin(spread: bool) -> None:
    new = rows(60_000, seed=2, spread=spread)
    shares = []
    for seed in range(5):  # the coverage that one set of 4000 rows gives is itself random
        made = made_of(rows(4000, seed=100 + seed, spread=spread))
        shares.append(coverage(made, new.assign(**bounds(made, new))))
    for position, group in enumerate(shares[0]["group"]):
        for level in LEVELS if group != "others" else ():  # 40 rows: they have no bin, and borrow those of their tier
            mean = np.mean([share.loc[position, f"covered_{level}"] for share in shares])
            assert abs(100 * mean - level) < 3, (group, level, mean)
    assert {"plain", "exact", "wild", "others", "all rows"} <= set(shares[0]["group"])


def test_coverage_follows_the_beta_distribution() -> None:
    """Of one bin of n rows: Beta(k, n + 1 - k), k = ceil((n + 1) 0.9), so its mean is at least 0.9 (Vovk, 2012)."""
    rng, found, n = np.random.default_rng(0), [], 97
    for _ in range(1000):
        frame = pd.DataFrame({"predicted": 10.0, "price": 10 * np.exp(rng.standard_normal(n))})
        (one,) = made_of(frame, "").bins
        found.append(2 * norm.cdf(one.widths[1]) - 1)
    expected = beta(89, n + 1 - 89)
    assert np.mean(found) == pytest.approx(expected.mean(), abs=3 * expected.std() / 1000**0.5)
    assert np.std(found) == pytest.approx(expected.std(), rel=0.1)


def test_the_width_of_one_bin_is_the_order_statistic() -> None:
    frame = pd.DataFrame({"predicted": 10.0, "price": 10 * np.exp(np.arange(1, 100) / 10)})
    (found,) = made_of(frame, "").bins
    assert found.widths == pytest.approx((8.0, 9.0, 9.5))
    assert (found.category, found.tier, found.rows) == (None, None, 99)


def test_a_larger_spread_gives_a_wider_interval() -> None:
    made = made_of(rows(4000))
    assert list(made.scales) == sorted(made.scales) and len(made.scales) == len(made.spread_edges) + 1
    new = pd.DataFrame({"predicted": 10.0, "category": "plain", "spread": [0.0, 0.5, 1.0, np.nan]})
    high = bounds(made, new)["high_90"]
    assert high[0] < high[1] < high[2] == high[3]


def test_spreads_and_errors_of_zero_are_handled() -> None:
    frame = rows(1000)
    frame.loc[:800, "spread"] = 0.0
    assert made_of(frame).scales
    frame.loc[:950, "price"] = frame["predicted"]
    made = made_of(frame)
    assert made.scales == ()
    assert all(np.isfinite(values).all() for values in bounds(made, frame).values())


def test_bounds_are_ordered_and_finite_for_any_price() -> None:
    made = made_of(rows(500))
    new = pd.DataFrame(
        {"predicted": [1e-300, 0.01, 20.0, 1e308], "category": ["plain", None, "new", ""], "spread": 1.0}
    )
    found = bounds(made, new)
    names = ["low_95", "low_90", "low_80", "predicted", "high_80", "high_90", "high_95"]
    ordered = np.stack([found[name] if name in found else new["predicted"].to_numpy() for name in names])
    assert np.isfinite(ordered).all() and (np.diff(ordered, axis=0) >= 0).all() and (ordered > 0).all()


def test_rare_missing_and_new_categories_have_the_bins_of_the_others() -> None:
    made = made_of(rows(20_000))
    assert made.categories == tuple(sorted([*GROUPS, "rare"])) and made.by == "kind"
    few = made_of(rows(4000))
    assert few.categories == tuple(sorted(GROUPS)), "40 rows are too few for a bin"
    new = pd.DataFrame({"predicted": 20.0, "spread": 0.5, "category": ["rare", None, "never seen", ""]})
    assert len(set(bounds(few, new)["high_90"])) == 1


def test_few_rows_give_one_bin_and_too_few_give_no_intervals() -> None:
    assert fit(rows(19)) is None
    assert [(one.category, one.tier) for one in made_of(rows(99)).bins] == [(None, None)]


@pytest.mark.parametrize("size", [1, 5])
def test_crossed_bounds_do_not_depend_on_rows_of_the_same_group(size: int) -> None:
    frame = rows(2000)
    groups = np.arange(2000) // size + 7
    before = crossed(frame, groups)
    frame.loc[groups == groups[50], "price"] *= 100
    after = crossed(frame, groups)
    assert before is not None and after is not None
    own = groups == groups[50]
    assert all((before[name][own] == after[name][own]).all() for name in before)
    assert any((before[name][~own] != after[name][~own]).any() for name in before)


def test_cross_fitting_needs_enough_rows_outside_of_each_part() -> None:
    frame = rows(20)
    assert fit(frame) is not None and crossed(frame, np.arange(20)) is None


def test_the_bins_of_each_category_are_large_enough_and_hold_all_its_rows() -> None:
    frame = rows(6000)
    frame.loc[frame["predicted"] > 55, "category"] = "plain"  # the others are rare in the highest tier
    made = made_of(frame)
    assert min(one.rows for one in made.bins) >= 100
    counts = frame["category"].where(frame["category"].isin(made.categories), "").value_counts()
    for category in made.categories:
        assert sum(one.rows for one in made.bins if one.category == category) == counts[category]
    assert {one.tier for one in made.bins if one.category == "exact"} == {None, 1, 2, 3}


def test_the_smallest_tier_shares_its_bin_with_the_few_other_rows() -> None:
    counts = np.array([[500, 40, 30, 120, 0], [500, 200, 99, 1, 0], [50, 30, 0, 0, 0], [300, 0, 0, 0, 0]])
    own = _has_own_bin(counts)
    assert own[0].tolist() == [True, False, False, False, False], "70 rows are too few, 190 are enough"
    assert own[1].tolist() == [True, True, False, False, False], "100 are enough"
    assert not own[2].any(), "80 rows are too few for any bin of its own"
    assert own[3].tolist() == [True, False, False, False, False]


def test_round_trip() -> None:
    made = made_of(rows(3000))
    again = parse(Intervals, seal(dataclasses.asdict(made)), "intervals.json")
    assert again == made
    with pytest.raises(DataError, match="is damaged"):
        parse(Intervals, seal(dataclasses.asdict(made)).replace(b'"rows":', b'"raws":', 1), "intervals.json")


def test_tier_names() -> None:
    made = dataclasses.replace(made_of(rows(3000)), tier_edges=(0.001, 9.99, 1234.5))
    assert tier_names(made) == ["below $0.001", "$0.001 to $9.99", "$9.99 to $1,234.50", "from $1,234.50"]


@pytest.fixture(scope="module")
def output(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("intervals")
    flags = ["--data", str(catalog), "--output", str(output), "--run-id", "r", *SMALL, "--val-fraction", "0.5"]
    assert train.main([*flags, "--epochs", "3"]) == 0
    where = ["--output", str(output), "--run-id", "r", "--device", "cpu"]
    assert evaluate_by_groups.main(where) == 0
    assert predict_test.main([*where, "--date", "2026-01-02"]) == 0
    return output


def best(output: Path) -> manifests.Checkpoint:
    return RunFolder(str(output / "runs/r")).best()


def test_a_checkpoint_has_the_intervals_of_its_validation_rows(output: Path) -> None:
    made = intervals_of(best(output))
    assert made is not None and made.by == "category" and made == fit(validation_of(best(output)), "category")
    assert not [finding for finding in verify(str(output)) if finding.verdict == "BAD"]


def test_a_submission_has_the_bounds_of_each_row(output: Path, catalog: Path) -> None:
    made = intervals_of(best(output))
    (path,) = (output / "submissions").rglob("predictions.parquet")
    found = pd.read_parquet(path)
    assert list(found)[:4] == ["sample_id", "price", "low_80", "high_80"]
    assert made is not None
    table = read_table(str(catalog), "test", priced=False)
    category = category_of(table, "category")
    assert category is not None
    known = found.rename(columns={"price": "predicted"}).assign(category=category[found["sample_id"]].to_numpy())
    for name, values in bounds(made, known).items():
        np.testing.assert_array_equal(found[name], values)


def test_an_evaluation_reports_the_coverage(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = output / "runs/r/metrics"
    found = pd.read_parquet(folder / "predictions.parquet")
    summary = json.loads((folder / "summary.json").read_text())
    groups = pd.read_parquet(folder / "groups.parquet")
    assert summary["intervals"][0]["group"] == "all rows"
    assert summary["covered_90"] == pytest.approx(is_within(found, 90).mean()) == groups["covered_90"][0]
    assert 0.8 < summary["covered_90"] < 1
    assert evaluate_by_groups.main(["--output", str(output), "--run-id", "r", "--device", "cpu", "--all"]) == 0
    said = capsys.readouterr().out
    assert "Intervals: share of the true prices inside" in said and "by tier of predicted price" in said


def test_bounds_in_an_evaluation_are_cross_fitted(output: Path) -> None:
    made = intervals_of(best(output))
    found = pd.read_parquet(output / "runs/r/metrics/predictions.parquet")
    assert made is not None
    assert (found["high_90"] != bounds(made, validation_of(best(output)))["high_90"]).any()


def test_a_missing_column_that_was_asked_for_is_an_error(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "1", "--interval-by", "categry"]
    assert train.main(flags) == 65
    assert "did you mean category? correct --interval-by" in capsys.readouterr().err


def test_a_test_table_without_the_column_gives_a_warning(
    catalog: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(catalog, tmp_path / "data")
    table = pd.read_csv(tmp_path / "data/test.csv", dtype="str")
    table.drop(columns="category").to_csv(tmp_path / "data/test.csv", index=False)
    where = ["--output", str(output), "--run-id", "r", "--device", "cpu", "--name", "other"]
    assert predict_test.main([*where, "--data", str(tmp_path / "data"), "--date", "2026-01-02"]) == 0
    assert "event=column_missing column=category" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made | {"rows": 7}, "intervals.json: rows: expected "),
        (
            lambda made: made | {"bins": [one | {"widths": [0, 0, 0]} for one in made["bins"]]},
            "within the bounds of 80%",
        ),
        (lambda made: made | {"bins": made["bins"][1:]}, "expected intervals for the rows of validation.parquet"),
        (lambda made: made | {"levels": []}, "expected levels, and in each bin a width for each, found 0 levels"),
    ],
)
def test_verify_finds_wrong_intervals_whose_digests_match(
    change: Callable[[dict[str, Any]], dict[str, Any]], said: str, output: Path, tmp_path: Path
) -> None:
    folder = tmp_path / best(output).name
    shutil.copytree(best(output).url, folder)
    made = json.loads((folder / "intervals.json").read_text())
    (folder / "intervals.json").write_bytes(seal(change(made)))
    files = {entry.key: (folder / entry.key).read_bytes() for entry in best(output).manifest.files}
    edit(folder / "MANIFEST.json", files=[vars(entry) for entry in manifests.entries(files)])
    found = [str(finding) for finding in verify(str(folder)) if finding.verdict == "BAD"]
    assert len(found) >= 1 and said in found[0], found


def test_verify_finds_a_wrong_coverage(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output / "runs/r", tmp_path / "r")
    folder = tmp_path / "r/metrics"
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_bytes(storage.as_json(summary | {"covered_90": 0.99}))
    names = ("groups.parquet", "predictions.parquet", "groups.csv", "summary.json")
    files = {name: (folder / name).read_bytes() for name in names}
    edit(folder / "MANIFEST.json", files=[vars(entry) for entry in manifests.entries(files)])
    (line,) = [str(finding) for finding in verify(str(tmp_path / "r")) if finding.verdict == "BAD"]
    assert "metrics/summary.json: covered_90, recomputed: expected " in line
