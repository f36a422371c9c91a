"""`fusion.compare` compares runs only on rows that all of them validated on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion import storage
from fusion.compare import __main__ as compare
from fusion.compare.out_of_fold import scored
from fusion.compare.standard_errors import clustered_mean
from fusion.errors import DataError
from fusion.metrics import row_smape
from fusion.qwen_clip import evaluate_by_groups, predict_test, train
from fusion.records.run import RunFolder
from fusion.records.schemas import seal
from tests.conftest import SMALL

PUBLISHED = [*SMALL, "--recipe", "published"]

Capture = pytest.CaptureFixture[str]

RUNS = {
    "a": ["--epochs", "3"],
    "b": ["--epochs", "3", "--dropout", "0.5"],
    "other-seed": ["--epochs", "1", "--seed", "7"],
    "half": ["--epochs", "1", "--val-fraction", "0.5"],
    "half-other-seed": ["--epochs", "1", "--val-fraction", "0.5", "--seed", "7"],
    "f0": ["--epochs", "1", "--folds", "2", "--fold", "0"],
    "all-folds": ["--epochs", "1", "--folds", "2"],
    "f1": ["--epochs", "1", "--folds", "2", "--fold", "1"],
}


@pytest.fixture(scope="module")
def output(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("compare"))
    for run_id, flags in RUNS.items():
        assert train.main(["--data", str(catalog), "--output", output, "--run-id", run_id, *PUBLISHED, *flags]) == 0
    assert predict_test.main(["--output", output, "--run-id", "a", "--name", "prices"]) == 0
    return output


def compared(output: str, capsys: Capture, *runs: str) -> dict[str, object]:
    capsys.readouterr()
    assert compare.main([*runs, "--output", output, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def fails(output: str, capsys: Capture, *runs: str) -> str:
    capsys.readouterr()
    assert compare.main([*runs, "--output", output]) in (64, 65)
    return capsys.readouterr().err


def test_metrics_are_computed_from_the_shared_rows(output: str, capsys: Capture) -> None:
    found = compared(output, capsys, "a", "b")
    runs = {run["name"]: run for run in found["runs"]}  # type: ignore[attr-defined]
    frames = {name: scored(RunFolder(f"{output}/runs/{name}")).rows for name in ("a", "b")}
    errors = {name: row_smape(rows["price"], rows["predicted"]) for name, rows in frames.items()}
    groups = frames["a"]["group"].to_numpy()
    assert found["rows"] == len(groups) == 101 and found["groups"] == len(set(groups)) < 101
    for name, run in runs.items():
        assert run["smape"] == asdict(clustered_mean(errors[name], groups))
        assert run["smape"]["mean"] == pytest.approx(RunFolder(f"{output}/runs/{name}").best().smape)
    best, other = sorted(runs, key=lambda name: errors[name].mean())
    assert [run["name"] for run in found["runs"]] == [best, other]  # type: ignore[attr-defined]
    assert runs[best]["to_best"] is None
    assert runs[other]["to_best"] == asdict(clustered_mean(errors[other] - errors[best], groups))
    assert runs["a"]["parameters"] == runs["b"]["parameters"] > 1000 and runs["a"]["minutes"] >= 0
    assert found["settings"] == {"dropout": [0.25, 0.5] if best == "a" else [0.5, 0.25]}


def test_a_run_with_other_validation_rows_is_listed_apart(output: str, capsys: Capture) -> None:
    found = compared(output, capsys, "other-seed", "a", "b", "half")
    assert {run["name"] for run in found["runs"]} == {"a", "b"}, "most runs validated on these rows"
    other, half = found["apart"]  # type: ignore[misc]
    assert (other["name"], other["to_best"], other["smape"]) == ("other-seed", None, None) and other["shared"] < 100
    assert compare.main(["other-seed", "a", "b", "--output", output]) == 0
    assert "do not compare with A: other-seed: fewer than 100 shared validation rows" in capsys.readouterr().out
    assert half["rows"] > 250


def test_a_run_listed_apart_is_compared_on_enough_shared_rows(output: str, capsys: Capture) -> None:
    found = compared(output, capsys, "half", "half-other-seed")
    (run,), (other,) = found["runs"], found["apart"]  # type: ignore[misc]
    mine, others = (scored(RunFolder(f"{output}/runs/{one['name']}")).rows for one in (run, other))
    ids = mine.index.intersection(others.index)
    assert other["shared"] == len(ids) >= 100
    errors = [row_smape(rows.loc[ids, "price"], rows.loc[ids, "predicted"]) for rows in (others, mine)]
    assert (other["smape"], other["best_smape"]) == tuple(map(np.mean, errors))
    assert other["to_best"]["mean"] == pytest.approx(other["smape"] - other["best_smape"])


def test_folds_of_one_recipe_count_as_one_run_on_all_rows(output: str, capsys: Capture, catalog: Path) -> None:
    found = compared(output, capsys, "f1", "f0")
    (run,) = found["runs"]  # type: ignore[misc]
    assert run["run_ids"] == ["f0", "f1"] and run["name"] == "f0 (2 folds)"
    assert found["rows"] == len(pd.read_csv(catalog / "train.csv"))
    found = compared(output, capsys, "f0", "f1", "a")
    assert found["apart"][0]["shared"] == 101 and found["apart"][0]["to_best"] is not None  # type: ignore[index]


def test_the_report_fits_into_100_columns(output: str, capsys: Capture) -> None:
    capsys.readouterr()
    assert compare.main([*RUNS, "--output", output]) == 0
    said = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 100
    assert "101 rows that all of them validated on, in " in said
    assert "Listed apart: they validated on other rows" in said
    assert " A " in said and "dropout" in said and "val_fraction" in said
    assert compare.main([f"{output}/runs/a/", f"{output}/runs/b", "--output", "elsewhere"]) == 0


def test_arguments_that_are_not_runs_are_refused(output: str, capsys: Capture) -> None:
    said = fails(output, capsys, "a", "prices")
    assert "error: prices is a submission, not a run" in said and "pull.py submissions --output" in said
    folder = next(Path(output).glob("submissions/prices/*/*"))
    assert "is a submission, not a run" in fails(output, capsys, "a", str(folder))
    assert "has no config.json: it is not the folder of a run" in fails(output, capsys, "a", f"{output}/runs")
    assert "no run half-other under" in (said := fails(output, capsys, "a", "half-other")) and "did you mean" in said
    assert "a is named 2 times" in fails(output, capsys, "a", "a")
    assert "expected at least two runs" in fails(output, capsys, "a")
    assert compare.main([]) == 64
    assert "hint: for example `python -m fusion.compare my-run-1 my-run-2" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_needs_an_evaluation(output: str, capsys: Capture) -> None:
    folder = next(Path(output).glob("runs/b/checkpoints/*/MANIFEST.json"))
    whole, before = folder.read_bytes(), scored(RunFolder(f"{output}/runs/b")).rows
    manifest = json.loads(whole)
    files = [one for one in manifest["files"] if one["key"] != "validation.parquet"]
    folder.write_bytes(seal(manifest | {"files": files}))
    try:
        with pytest.raises(DataError, match="did not save its predictions of the validation rows") as caught:
            scored(RunFolder(f"{output}/runs/b"))
        command = f"`python -m fusion.qwen_clip.evaluate_by_groups --output {output} --run-id b`"
        assert caught.value.remedy == f"evaluate it first: {command}"
        assert evaluate_by_groups.main(["--output", output, "--run-id", "b"]) == 0
        after = scored(RunFolder(f"{output}/runs/b")).rows
        pd.testing.assert_frame_equal(before[after.columns], after, rtol=1e-6)
        predictions = Path(output, "runs/b/metrics/predictions.parquet")
        storage.write(str(predictions), predictions.read_bytes()[:-1])
        with pytest.raises(DataError, match="did not save"):
            scored(RunFolder(f"{output}/runs/b"))
    finally:
        folder.write_bytes(whole)


def test_two_runs_of_the_same_fold_are_refused(output: str, capsys: Capture, catalog: Path) -> None:
    again = ["--data", str(catalog), "--output", output, "--run-id", "f1-again", *PUBLISHED, *RUNS["f1"]]
    assert train.main(again) == 0
    assert "are of the same fold of one recipe" in fails(output, capsys, "f0", "f1", "f1-again")
