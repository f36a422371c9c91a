from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from fusion import signals, storage
from fusion.data.tables import Table
from fusion.errors import StopRequested, UnreachableError
from fusion.evaluation import groups, tables
from fusion.evaluation.evaluate import _predictions, _show
from fusion.evaluation.files import _replace, _summary
from fusion.evaluation.groups import BIN_NAMES, RANGE_NAMES, Evaluation, evaluate, price_bins
from fusion.evaluation.rows import columns_of_report
from fusion.metrics import bootstrap_interval, compute_metrics, row_smape
from fusion.records import pointers
from fusion.records.attempts import take_lease
from fusion.records.manifests import Checkpoint, Folder
from fusion.records.run import RunFolder
from fusion.records.schemas import Baselines, BaselineScore, RunPointer


def rows(prices: list[float] | np.ndarray, **columns: object) -> pd.DataFrame:
    prices = np.asarray(prices, float)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"sample_id": [f"id{i}" for i in range(len(prices))], "price": prices, "present": "all"})
    return frame.assign(predicted=np.abs(prices) * np.exp(0.3 * rng.standard_normal(len(prices))), **columns)


NO_COLUMNS = pd.DataFrame()  # to group by


def show(evaluation: Evaluation) -> None:
    tables.show(evaluation)


def test_every_group_has_the_metrics_of_its_rows() -> None:
    prices = np.random.default_rng(1).lognormal(3, 1.5, 500)
    brands = np.where(np.arange(500) % 3, "a", "b")
    table = rows(prices, brand=brands)
    groups = evaluate(table, table[["brand"]]).groups.set_index(["by", "group"])
    assert list(groups.loc["price_bin"].index) == BIN_NAMES
    assert list(groups.loc["price_range"].index) == RANGE_NAMES
    for name in ("price_bin", "price_range", "present", "brand"):
        assert groups.loc[name, "count"].sum() == 500
        assert groups.loc[name, "share"].sum() == pytest.approx(1)
    for (by, group), part in {("brand", "a"): table[brands == "a"], ("overall", "all rows"): table}.items():
        found, wanted = groups.loc[(by, group)], compute_metrics(part["price"], part["predicted"])
        for metric, value in wanted.items():
            assert found[metric] == pytest.approx(value)
        assert found["smape_low"] < found["smape"] < found["smape_high"]
        assert found["bias"] == pytest.approx((part["predicted"] - part["price"]).mean())
        assert found["median_error"] == pytest.approx((part["predicted"] - part["price"]).abs().median())


def test_bins_include_their_lower_edge() -> None:
    prices = pd.Series([0.01, 4.99, 5, 10, 499.99, 500, 1e9, -1, np.nan])
    expected = ["0-5", "0-5", "5-10", "10-15", "200-500", "500+", "500+", "outside", "outside"]
    assert price_bins(prices).tolist() == expected


@pytest.mark.parametrize("prices", [[7.0], [7.0, 7.0], [-3.0, 7.0], [1e9], [0.001, 0.002]])
def test_single_rows_empty_bins_and_prices_outside_are_handled(
    prices: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = evaluate(rows(prices), NO_COLUMNS, gate=np.full((len(prices), 3), 1 / 3))
        show(evaluation)
    groups = evaluation.groups.set_index(["by", "group"])
    assert groups.loc["price_bin", "count"].sum() == len(prices)
    assert ("price_bin", "outside") in groups.index or min(prices) >= 0
    assert "all rows" in capsys.readouterr().out
    summary = json.loads(_summary(RunFolder("out/runs/r"), Checkpoint("out/runs/r/checkpoints/step-1", {}), evaluation))
    assert summary["count"] == len(prices)


def test_the_twenty_worst_and_best_rows_are_sorted() -> None:
    table = rows(np.random.default_rng(2).lognormal(3, 1, 100))
    evaluation = evaluate(table, NO_COLUMNS)
    errors = np.sort(row_smape(table["price"], table["predicted"]))
    np.testing.assert_allclose(evaluation.worst["smape"], errors[::-1][:20])
    np.testing.assert_allclose(evaluation.best["smape"], errors[:20])


@pytest.mark.parametrize("n_rows", [1, 19, 20, 21, 400])
@pytest.mark.parametrize("n_unknown", [0, 1, 30])
def test_worst_and_best_rows_equal_those_of_a_full_sort(n_rows: int, n_unknown: int) -> None:
    errors = np.random.default_rng(n_rows).integers(0, 15, n_rows) * 10.0  # many are equal
    errors[:n_unknown] = np.nan
    table = rows(np.ones(n_rows), smape=errors)
    ordered = table.sort_values(["smape", "sample_id"], ascending=[False, True])
    worst, best = groups._extremes(table)
    pd.testing.assert_frame_equal(worst, ordered.head(20))
    pd.testing.assert_frame_equal(best, ordered.tail(20).iloc[::-1])


def test_a_report_reads_the_columns_that_it_shows() -> None:
    names = ["predicted", "sample_id", "title", "", "price", "brand", "text", "colour"]
    assert columns_of_report(["colour", "missing"], names) == ["colour", "missing", "title", "brand"]


def test_gates_are_means_over_the_rows_of_a_bin() -> None:
    gate = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    gates = evaluate(rows([3.0, 4.0, 700.0]), NO_COLUMNS, gate=gate).gates
    assert gates.loc["0-5"].tolist() == [0.75, 0.25]
    assert gates.loc["500+"].tolist() == [0.0, 1.0]
    assert gates.loc["all rows"].tolist() == [0.5, 0.5]


def test_a_column_with_many_values_is_cut_off_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(np.full(600, 9.0), code=[str(i) for i in range(600)])
    assert (evaluate(table, table[["code"]]).groups["by"] == "code").sum() == 200
    assert "event=by_truncated column=code values=600" in capsys.readouterr().err


def test_missing_values_are_a_group() -> None:
    table = rows(np.full(60, 9.0))
    column = pd.Series(["a"] * 43 + [None] * 9 + [""] * 4 + [" "] * 4)
    groups = evaluate(table, pd.DataFrame({"brand": column})).groups.query("by == 'brand'").set_index("group")
    assert groups["count"].to_dict() == {"a": 43, "missing": 17}


@pytest.mark.parametrize("name", ["present", "predicted", "smape", "price_bin", "price_range", "overall", "sample_id"])
def test_a_column_with_the_name_of_a_computed_one_keeps_its_values(name: str) -> None:
    table = rows(np.full(60, 9.0))
    groups = evaluate(table, pd.DataFrame({name: ["x", "y", "outside"] * 20})).groups
    ours = groups[groups["group"].isin(["x", "y", "outside"])]
    assert ours["count"].tolist() == [20] * 3 and not groups.duplicated(["by", "group"]).any()
    assert groups.set_index("by").loc["overall", "count"] == 60


def test_present_roles_are_described_in_words() -> None:
    present = {"image": torch.tensor([True, False, True, False]), "text": torch.tensor([True, True, False, False])}
    table = Table(
        pd.DataFrame({"price": np.ones(4), "present": 7}, index=pd.Index(list("abcd"), name="sample_id")), np.arange(4)
    )
    found = _predictions(table, np.arange(4.0), present)
    assert found["present"].tolist() == ["all", "without image", "without text", "none"]
    assert found["sample_id"].tolist() == list("abcd") and found["predicted"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_and_ids_are_never_cut_off(width: int) -> None:
    frame = pd.DataFrame(
        {"sample_id": ["B01IRPB3L4"], "price": [19.99], "predicted": [1234.5], "smape": [123.45]}
        | {"title": ["Item Name: Matty M Ladies' Midi Skirt, black, in many sizes"], "category": ["SKIRT or so"]}
    )
    console = Console(width=width)
    with console.capture() as captured:
        console.print(tables._plain("Worst rows, by SMAPE", frame, width))
    said = captured.get()
    assert all(value in said for value in ("B01IRPB3L4", "19.99", "1,234", "123.45"))
    assert ("Item Name" in said) == (width >= 80)


def test_values_of_columns_cannot_control_the_terminal() -> None:
    """Markup is not interpreted. Otherwise `[/b]`, which closes nothing, would raise an error."""
    hostile = "[/b] \x1b[2J [red]"
    rows = pd.DataFrame({"sample_id": [hostile], "price": [1.0], "predicted": [1.0], "smape": [0.0], hostile: hostile})
    figures = {"by": "category", "group": hostile, "count": 1.0, "share": 1.0, "smape": 0.0, "smape_low": 0.0}
    groups = pd.DataFrame([figures | {"smape_high": 0.0, "mae": 0.0, "mean_true": 1.0}])
    coverage = pd.DataFrame([{"by": "category", "group": hostile, "count": 1, "error": 0.1, "factor_90": 1.0}])
    console = Console(width=80)
    with console.capture() as captured:
        for table in (tables._plain("", rows, 150), tables._groups(groups, 80, ""), tables._coverage(coverage)):
            console.print(table)
    said = captured.get()
    assert said.count(r"[/b] \x1b[2J [red]") == 5 and "\x1b" not in said


def test_a_manifest_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "MANIFEST.json").write_text("another's")
    monkeypatch.setattr(storage, "remove", lambda _: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(UnreachableError, match=r"MANIFEST.json was changed by others at each of \d+ tries"):
        _replace(Folder(str(tmp_path)), {}, b"ours")
    monkeypatch.setattr(signals, "_received", [15])
    with pytest.raises(StopRequested):
        _replace(Folder(str(tmp_path)), {}, b"ours")


def test_retries_of_conditional_writes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(storage, "create", lambda *_: False)
    with pytest.raises(UnreachableError):
        pointers.move(str(tmp_path), "runs", "v", "best", target=RunPointer("r", "c", 1.0))
    with pytest.raises(UnreachableError):
        take_lease(RunFolder(str(tmp_path)))


@pytest.mark.parametrize("as_trained", [True, False, None])
def test_the_report_says_that_data_differ(as_trained: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(np.full(9, 9.0))
    evaluation = evaluate(table, NO_COLUMNS, as_trained=as_trained)
    _show(evaluation, table.set_index("sample_id"))
    assert ("with other prices or embeddings than in training" in capsys.readouterr().out) == (as_trained is False)
    checkpoint = Checkpoint("out/runs/r/checkpoints/step-1", {})  # type: ignore[arg-type]
    assert json.loads(_summary(RunFolder("out/runs/r"), checkpoint, evaluation))["as_trained"] is as_trained


def test_intervals_of_many_rows_are_not_resampled() -> None:
    started = time.process_time()
    low, high = bootstrap_interval(np.random.default_rng(0).exponential(10, 2_000_000))
    assert 9.9 < low < high < 10.1 and time.process_time() - started < 2, "resampling would take 27 s"


MEDIAN = BaselineScore("median price", 59.5, 57.0, 62.0, 240)
KNOWN = Baselines(2, 60, (MEDIAN, BaselineScore("ridge regression", 45.9, None, None, 240, (30.0,))))


@pytest.mark.parametrize("everything", [False, True])
def test_the_report_begins_with_the_baselines_and_ends_with_the_headline(
    everything: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    table = rows(np.full(60, 9.0))
    evaluation = evaluate(table, pd.DataFrame({"brand": [str(i) for i in range(60)]}))
    evaluation = replace(evaluation, baselines=KNOWN)
    tables.show(evaluation, "", "out/runs/r/metrics", everything)
    said = capsys.readouterr().out
    lines = [line.strip() for line in said.splitlines()]
    assert [line.split("  ")[0] for line in lines[4:7]] == ["median price", "ridge regression", "all rows"]
    assert lines[-4].startswith("SMAPE ")
    assert lines[-3] == "For comparison: median price 59.50%, ridge regression 45.90%"
    assert lines[-1].startswith("written: out/runs/r/metrics")
    assert ("--all" in lines[-1]) != everything
    assert "by price_bin" in said
    assert ("by price_range" in said and "R2" in said and "Quantiles" in said) == everything
    assert len(lines) < 40 or everything, "the short report fits on a screen"


def test_the_report_says_that_a_model_is_not_better_than_a_baseline() -> None:
    poor = replace(evaluate(rows(np.full(60, 9.0)).assign(predicted=1.0), NO_COLUMNS), baselines=KNOWN)
    assert any("not better than: median price, ridge regression." in line for line in tables.headline(poor))


def test_a_group_of_one_row_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(np.full(60, 9.0)).assign(price=[9.0] * 59 + [150.0])
    tables.show(evaluate(table, NO_COLUMNS), "", "", everything=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" 100-200")]
    assert line.split()[4] == "-" and "nan" not in line and "- -" not in line
