"""Ensembles: their weights, their predictions, their verification, and that a kill leaves no incomplete one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fusion import storage
from fusion.all_embeddings import predict_test as predict_all
from fusion.all_embeddings import train as train_all
from fusion.compare.standard_errors import Estimate
from fusion.ensemble import __main__ as ensemble
from fusion.ensemble import predict_test
from fusion.jobs import pull, submit
from fusion.metrics import compute_smape
from fusion.qwen_clip import predict_test as predict_two
from fusion.qwen_clip import train as train_two
from fusion.records import pointers
from fusion.records.intervals import misplaced
from fusion.records.schemas import RunPointer, SubmissionPointer
from fusion.report import __main__ as report
from fusion.verify.__main__ import verify
from tests.conftest import SMALL, run_command, upload
from tests.verify.test_verify_everything import is_found, mutations

PUBLISHED = [*SMALL, "--recipe", "published"]

Capture = pytest.CaptureFixture[str]
Comparables = tuple[np.ndarray, np.ndarray, np.ndarray]

FOLDS = ["q0", "q1", "a0", "a1"]


@pytest.fixture(scope="module")
def trained(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds of each variant, and a run that validated on other rows."""
    output = tmp_path_factory.mktemp("ensemble")
    where = ["--data", str(catalog), "--output", str(output), *PUBLISHED, "--epochs", "3"]
    for fold in ("0", "1"):
        assert train_two.main([*where, "--folds", "2", "--fold", fold, "--run-id", f"q{fold}"]) == 0
        assert train_all.main([*where, "--folds", "2", "--fold", fold, "--run-id", f"a{fold}"]) == 0
    assert train_two.main([*where, "--run-id", "single"]) == 0
    return output


@pytest.fixture(scope="module")
def mixed(trained: Path) -> Path:
    assert ensemble.main([*FOLDS, "--output", str(trained), "--run-id", "mix"]) == 0
    return trained


@pytest.fixture
def copied(mixed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed, tmp_path / "output"))


def record(output: Path, run_id: str = "mix") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "runs" / run_id / "ensemble.json").read_text())
    return found


def submission(output: Path, name: str) -> pd.Series:
    current = pointers.read(SubmissionPointer, str(output), "submissions", name, "current")
    assert current is not None
    return pd.read_csv(output / "submissions" / current.submission / "submission.csv", index_col=0)["price"]


def wrong(output: Path) -> list[str]:
    return [str(finding) for finding in verify(str(output)) if finding.verdict == "BAD"]


def test_the_record_agrees_with_the_validation_rows(mixed: Path, catalog: Path) -> None:
    said, rows = record(mixed), pd.read_parquet(mixed / "runs/mix/validation.parquet")
    prices = pd.read_csv(catalog / "train.csv").set_index("sample_id")["price"]
    assert len(rows) == said["rows"] == len(prices)
    assert (rows["price"].to_numpy() == prices[rows["sample_id"].astype(int)].to_numpy()).all()
    assert compute_smape(rows["price"], rows["predicted"]) == pytest.approx(said["smape"])
    assert sum(member["weight"] for member in said["members"]) == pytest.approx(1)
    assert {member["run"] for member in said["members"]} <= {f"runs/{run}" for run in FOLDS}
    best = pointers.read(RunPointer, str(mixed), "runs", "ensemble", "best")
    assert best is not None and (best.run_id, best.smape) == ("mix", said["smape"])
    assert wrong(mixed) == []


def test_its_price_is_the_weighted_mean_of_the_members_log_prices(copied: Path) -> None:
    where = ["--output", str(copied), "--date", "2026-01-02"]
    commands = {"q": predict_two, "a": predict_all}
    expected: Any = 0.0
    for member in record(copied)["members"]:
        run_id = storage.base(member["run"])
        assert commands[run_id[0]].main([*where, "--run-id", run_id, "--name", run_id]) == 0
        expected = expected + member["weight"] * np.log(submission(copied, run_id))
    assert predict_test.main(where) == 0
    found = submission(copied, "test")
    np.testing.assert_allclose(np.log(found), expected, atol=2e-5)
    current = pointers.read(SubmissionPointer, str(copied), "submissions", "test", "current")
    assert current is not None
    rows = pd.read_parquet(copied / "submissions" / current.submission / "predictions.parquet")
    assert ((rows["low_90"] < rows["price"]) & (rows["price"] < rows["high_90"])).all()
    assert wrong(copied) == []


def test_ranks_and_a_repeated_prediction_give_the_same_prices(copied: Path, tmp_path: Path, capsys: Capture) -> None:
    where = ["--output", str(copied), "--device", "cpu"]
    assert predict_test.main([*where, "--date", "2026-01-02", "--name", "one"]) == 0
    done = run_command("fusion.ensemble.predict_test", *where, "--date", "2026-01-02", "--name", "two", ranks=2)
    assert done.code == 0, done.err
    np.testing.assert_allclose(submission(copied, "one"), submission(copied, "two"), rtol=1e-6)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert predict_test.main([*where, "--date", "2026-01-02", "--name", "one"]) == 0
    assert "event=published_before" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()} == before
    assert predict_test.main([*where, "--date", "2026-01-03", "--name", "one"]) == 0
    assert "event=published" in (said := capsys.readouterr().err) and "unchanged=True" in said
    assert predict_test.main([*where, "--date", "2026-01-04", "--name", "one", "--run-id", "mix"]) == 0
    assert "event=published" in capsys.readouterr().err
    assert wrong(copied) == [] and not [path for path in copied.glob("parts/**/*") if path.is_file()]


def test_members_with_computed_sources(copied: Path, catalog: Path) -> None:
    """Each member computes them with what it fitted on its own training rows."""
    flags = ["--data", str(catalog), "--output", str(copied), *PUBLISHED, "--epochs", "1", "--features", "text"]
    for fold in ("0", "1"):
        assert train_two.main([*flags, "--folds", "2", "--fold", fold, "--run-id", f"t{fold}"]) == 0
    assert ensemble.main(["t0", "t1", "q0", "q1", "--output", str(copied), "--run-id", "texts"]) == 0
    where = ["--output", str(copied), "--date", "2026-01-02"]
    assert predict_test.main([*where, "--run-id", "texts", "--name", "texts"]) == 0
    expected: Any = 0.0
    for member in record(copied, "texts")["members"]:
        run_id = storage.base(member["run"])
        assert predict_two.main([*where, "--run-id", run_id, "--name", run_id, "--max-training-drift", "100"]) == 0
        expected = expected + member["weight"] * np.log(submission(copied, run_id))
    np.testing.assert_allclose(np.log(submission(copied, "texts")), expected, atol=2e-5)
    assert wrong(copied) == []


def test_a_run_with_all_folds_and_fold_runs_can_be_mixed(copied: Path, catalog: Path) -> None:
    """The run is a model with a memory. It validated on the rows of both fold runs together."""
    flags = ["--data", str(catalog), "--output", str(copied), "--device", "cpu", "--folds", "2", "--run-id", "best"]
    small = ["--width", "16", "--hidden", "16", "--components", "8", "--neighbours", "8", "--epochs", "2"]
    assert train_two.main([*flags, *small]) == 0
    assert ensemble.main(["best", "q0", "q1", "--output", str(copied), "--run-id", "both"]) == 0
    where = ["--output", str(copied), "--date", "2026-01-02"]
    assert predict_test.main([*where, "--run-id", "both", "--name", "both"]) == 0
    expected: Any = 0.0
    for member in record(copied, "both")["members"]:
        run_id = storage.base(member["run"])
        assert predict_two.main([*where, "--run-id", run_id, "--name", run_id]) == 0
        expected = expected + member["weight"] * np.log(submission(copied, run_id))
    np.testing.assert_allclose(np.log(submission(copied, "both")), expected, atol=2e-5)
    assert wrong(copied) == []
    (weight,) = (member["weight"] for member in record(copied, "both")["members"] if member["run"] == "runs/best")
    mine, alone = comparables(copied, "both"), comparables(copied, "best")
    check_same_but_for_ties(mine, alone)  # only this member has neighbours
    np.testing.assert_allclose(mine[2], weight * alone[2], rtol=1e-5)


def test_the_report_shows_the_members_and_is_made_again(copied: Path, capsys: Capture) -> None:
    folder = copied / "runs/mix"
    page, card = (folder / "report.html").read_text(), (folder / "model_card.md").read_text()
    smape = f"{record(copied)['smape']:.2f}"
    first = f"{storage.base(record(copied)['members'][0]['run'])} (2 folds)"  # a recipe may have a weight of 0
    for text in (page, card):
        assert smape in text and first in text and "The fold runs of a recipe share its weight" in text
    assert "<h1>mix</h1>" in page and f"| this ensemble | {smape} |" in card
    for path in ("report.html", "model_card.md"):
        (folder / path).unlink()
    assert ensemble.main([*FOLDS, "--output", str(copied), "--run-id", "mix"]) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert wrong(copied) == []
    again = (folder / "report.html").read_text()
    assert again.replace(str(copied), "") != page and first in again, "paths are those of this copy"


def test_a_pulled_ensemble_has_its_report_and_can_write_it_without_members(copied: Path, tmp_path: Path) -> None:
    assert pull.main(["run", "mix", "--output", str(copied), "--to", str(tmp_path / "pulled")]) == 0
    pulled = tmp_path / "pulled/runs/mix"
    for name in ("report.html", "model_card.md", "validation.parquet"):
        assert (pulled / name).read_bytes() == (copied / "runs/mix" / name).read_bytes()
    assert report.main(["--run-dir", str(pulled)]) == 0
    assert [str(one) for one in verify(str(pulled)) if one.verdict == "BAD"] == []
    page = (pulled / "report.html").read_text()
    assert "The scores of the members are not shown: runs/" in page and "is not beside the ensemble" in page
    assert f"{record(copied)['smape']:.2f}" in page and "Where it is right and wrong" in page


def test_a_report_does_not_show_scores_of_another_model(copied: Path) -> None:
    one, other = (copied / member["run"] for member in record(copied)["members"][:2])
    shutil.rmtree(one)
    shutil.copytree(other, one)
    assert report.main(["--run-dir", str(copied / "runs/mix")]) == 0
    assert f"not shown: runs/{one.name} now has another model" in (copied / "runs/mix/report.html").read_text()


def test_repeating_the_command_changes_nothing(copied: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert ensemble.main([*FOLDS, "--output", str(copied), "--run-id", "mix"]) == 0
    assert "event=finished_before" in (said := capsys.readouterr()).err
    assert "q0 (2 folds)" in said.out and "python -m fusion.ensemble.predict_test --output" in said.out
    assert max(map(len, said.out.splitlines()[:-2])) <= 100, "but for the lines with paths"
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


class Killed(BaseException):
    """Ends a command in this process as a SIGKILL would: no handler of the command catches it."""


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[str], None]]]:
    """Functions added to this list are called with the URL of each write to the store, after the write."""
    called: list[Callable[[str], None]] = []
    for name in ("write", "create", "replace"):
        original = getattr(storage, name)

        def call(url: str, *arguments: Any, original: Callable[..., Any] = original) -> Any:
            done = original(url, *arguments)
            for one in called:
                one(url)
            return done

        monkeypatch.setattr(storage, name, call)
    yield called
    called.clear()


def test_a_kill_after_any_write_leaves_no_incomplete_ensemble(
    trained: Path, mixed: Path, tmp_path: Path, writes: list[Callable[[str], None]]
) -> None:
    n_writes, seen = 0, list[str]()
    while True:
        output = tmp_path / str(n_writes)
        shutil.copytree(trained, output, ignore=shutil.ignore_patterns("mix", "ensemble", "submissions"))
        command = [*FOLDS, "--output", str(output), "--run-id", "mix"]
        count = iter(range(n_writes))

        def kill(url: str, count: Iterator[int] = count) -> None:
            seen.append(url.rpartition("/")[2])
            if next(count, None) is None:
                raise Killed

        writes.append(kill)
        try:
            assert ensemble.main(command) == 0
        except Killed:
            writes.clear()
            assert wrong(output) == []
            assert ensemble.main(command) == 0
        else:
            break
        for name in ("ensemble.json", "validation.parquet", "intervals.json"):
            path = f"runs/mix/{name}"
            assert (output / path).read_bytes() == (mixed / path).read_bytes()
        assert wrong(output) == []
        assert pointers.read(RunPointer, str(output), "runs", "ensemble", "best") is not None
        n_writes += 1
    assert n_writes == 10, seen


# `verify` cannot find these changes, because a command that was killed leaves the same state.
INVISIBLE = {
    "pointers/runs/ensemble/best.json: removed",
    "runs/mix/model_card.md: removed",
    "runs/mix/report.html: removed",
}


def test_verify_finds_every_change(copied: Path) -> None:
    missed = set()
    n_tried = 0
    for name, mutation in mutations(copied):
        if all("runs/mix" in str(path) or "pointers/runs/ensemble" in str(path) for path in mutation):
            n_tried += 1
            if not is_found(mutation, copied):
                missed.add(name)
    assert missed == INVISIBLE and n_tried > 100


def test_a_missing_or_changed_member_is_refused(copied: Path, capsys: Capture) -> None:
    heaviest = max(record(copied)["members"], key=lambda member: member["weight"])  # one of weight 0 is not needed
    run = storage.base(heaviest["run"])
    other = f"{run[0]}{1 - int(run[1])}"
    shutil.move(copied / "runs" / run, copied / "elsewhere")
    named = f"member runs/{run}: model_sha256"
    assert any(named in line and "cannot predict without it" in line for line in wrong(copied))
    where = ["--output", str(copied), "--date", "2026-01-02"]
    assert predict_test.main(where) == 65
    said = capsys.readouterr().err
    assert "error: the ensemble mix needs step-" in said and f"of runs/{run}, which does not exist" in said
    assert "hint: restore that run, or make an ensemble of the runs that are left with python -m fusion.ens" in said
    shutil.copytree(copied / "runs" / other, copied / "runs" / run)
    assert predict_test.main(where) == 65
    assert f"of runs/{run}, which now has another model" in capsys.readouterr().err


def weighted_mean(output: Path, where: list[str]) -> Any:
    """Predicts with each member alone, and returns the weighted mean of their log prices."""
    commands, total = {"q": predict_two, "a": predict_all}, 0.0
    for member in record(output)["members"]:
        run_id = storage.base(member["run"])
        assert commands[run_id[0]].main([*where, "--run-id", run_id, "--name", run_id]) == 0
        total = total + member["weight"] * np.log(submission(output, run_id))
    return total


def comparables(output: Path, name: str) -> Comparables:
    """Ids, prices and weights of the comparable products of a submission, each [N, n]."""
    rows = submitted(output, name)
    ids, prices, weights = (np.stack(rows[f"comparable_{part}"].to_list()) for part in ("ids", "prices", "weights"))
    return ids, prices, weights


def check_same_but_for_ties(found: Comparables, expected: Comparables) -> None:
    """Asserts that both list the same products; those of equal weight may be in any order, or follow the last."""
    for ids, prices, others, other_prices, weights in zip(*found[:2], *expected, strict=True):
        for weight in weights:
            tied = np.isclose(weights, weight, rtol=1e-4, atol=0)
            if not tied[-1]:  # of those that are as light as the last, some are left out
                assert set(ids[tied]) == set(others[tied])
        known = dict(zip(others, other_prices, strict=True))
        assert all(known.get(one, price) == price for one, price in zip(ids, prices, strict=True))


def submitted(output: Path, name: str) -> pd.DataFrame:
    current = pointers.read(SubmissionPointer, str(output), "submissions", name, "current")
    assert current is not None
    return pd.read_parquet(output / "submissions" / current.submission / "predictions.parquet")


@pytest.fixture(scope="module")
def computing(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of two fold runs with computed sources, fitted on their own training rows, and two without."""
    output = tmp_path_factory.mktemp("computing")
    where = ["--data", str(catalog), "--output", str(output), *PUBLISHED, "--epochs", "3", "--folds", "2", "--fold"]
    for fold in ("0", "1"):
        texts = ["--features", "text", "--columns", "category"]
        assert train_two.main([*where, fold, "--run-id", f"q{fold}", *texts]) == 0
        assert train_all.main([*where, fold, "--run-id", f"a{fold}"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Estimate, "is_significant", False)  # forces equal weights; fitted ones may be 0
        assert ensemble.main([*FOLDS, "--output", str(output), "--run-id", "mix"]) == 0
    return output


def test_each_member_computes_its_own_sources(computing: Path, capsys: Capture) -> None:
    where = ["--output", str(computing), "--date", "2026-01-02"]
    fitted = {(computing / f"runs/q{fold}/features.safetensors").read_bytes() for fold in (0, 1)}
    assert len(fitted) == 2, "folds train on other rows"
    expected = weighted_mean(computing, where)
    capsys.readouterr()
    assert predict_test.main(where) == 0
    assert capsys.readouterr().err.count("event=looked role=text_chars") == 1, "equal texts are checked once"
    np.testing.assert_allclose(np.log(submission(computing, "test")), expected, atol=2e-5)
    done = run_command("fusion.ensemble.predict_test", *where, "--device", "cpu", "--name", "two", ranks=2)
    assert done.code == 0, done.err
    np.testing.assert_allclose(submission(computing, "two"), submission(computing, "test"), rtol=1e-6)
    assert wrong(computing) == []


def test_an_ensemble_of_runs_with_a_memory_and_all_folds(trained: Path, catalog: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "output"))
    where = ["--data", str(catalog), "--output", str(output), "--device", "cpu", "--epochs", "3", "--folds", "2"]
    small = ["--width", "16", "--hidden", "16", "8", "--components", "16", "--neighbours", "16", "--batch-size", "64"]
    for run_id in ("whole", "again"):
        assert train_two.main([*where, *small, "--run-id", run_id, "--features", "text"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Estimate, "is_significant", False)
        for runs, name in ((["whole", "again"], "two"), (["whole", "a0", "a1"], "three")):
            assert ensemble.main([*runs, "--output", str(output), "--run-id", name]) == 0
            rows = pd.read_parquet(output / f"runs/{name}/validation.parquet")
            assert ("spread" in rows) == (name == "two"), "the ensemble has a spread only if all members have one"
            limits = json.loads((output / f"runs/{name}/intervals.json").read_text())
            assert bool(limits["scales"]) == (name == "two")
            where = ["--output", str(output), "--date", "2026-01-02", "--run-id", name, "--name", name]
            assert predict_test.main(where) == 0
            assert not misplaced(submitted(output, name), "price")
    alone = ["--output", str(output), "--date", "2026-01-02", "--run-id", "whole", "--name", "alone"]
    assert predict_two.main(alone) == 0
    one, two = comparables(output, "alone"), comparables(output, "two")
    check_same_but_for_ties(two, one)  # two equal runs have the comparable products of one
    np.testing.assert_allclose(one[2], two[2], atol=1e-6)
    np.testing.assert_allclose(submission(output, "alone"), submission(output, "two"), rtol=1e-4)


def test_a_member_without_its_computed_sources_is_refused(computing: Path, tmp_path: Path, capsys: Capture) -> None:
    output = Path(shutil.copytree(computing, tmp_path / "output"))
    (output / "runs/q1/features.safetensors").unlink()
    assert predict_test.main(["--output", str(output), "--date", "2026-01-03", "--name", "gone"]) == 65
    assert "runs/q1/features.safetensors does not exist" in capsys.readouterr().err


def test_a_table_without_the_column_of_a_feature_is_refused(computing: Path, catalog: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(catalog, tmp_path / "data"))
    pd.read_csv(data / "test.csv").drop(columns="catalog_content").to_csv(data / "test.csv", index=False)
    done = run_command(
        *("fusion.ensemble.predict_test", "--output", str(computing), "--data", str(data), "--name", "lacks"),
        *("--device", "cpu"),
    )
    assert done.code == 65 and "test.csv has no column 'catalog_content'" in done.err


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["q0", "q1", "single"], "q0 (2 folds) validated on 503 rows and single on 101, of which they share 101"),
        (["single", "mix"], "mix is itself an ensemble"),
        (["single", "nothing"], "no run nothing under"),
        (["single"], "expected at least two runs"),
    ],
)
def test_runs_that_cannot_be_mixed_are_refused(runs: list[str], said: str, mixed: Path, capsys: Capture) -> None:
    assert ensemble.main([*runs, "--output", str(mixed)]) in (64, 65)
    assert said in capsys.readouterr().err


def test_names_that_are_taken_or_invalid_are_refused(copied: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--output", str(copied)]
    for runs, name, said in (
        (FOLDS, "single", "single is the name of a run in"),
        (["q0", "q1"], "mix", "the ensemble mix exists with other members, weights or rows"),
        (FOLDS, "My Mix", "--run-id is 'My Mix': expected at most 63 small letters"),
    ):
        assert ensemble.main([*runs, *flags, "--run-id", name]) == 78
        assert said in capsys.readouterr().err
    shutil.copytree(copied / "runs/q0", tmp_path / "q0")
    assert ensemble.main([str(tmp_path / "q0"), "q1", *flags]) == 64
    assert "/q0 is not in" in capsys.readouterr().err


def test_the_commands_of_variants_and_of_ensembles_name_each_other(mixed: Path, capsys: Capture) -> None:
    assert predict_test.main(["--output", str(mixed), "--run-id", "q0"]) == 78
    said = capsys.readouterr().err
    assert "run q0 is a run of qwen_clip, and this command predicts with ensembles" in said
    assert "hint: use python -m fusion.qwen_clip.predict_test" in said
    assert predict_two.main(["--output", str(mixed), "--run-id", "mix"]) == 78
    assert "python -m fusion.ensemble.predict_test" in capsys.readouterr().err
    assert predict_test.main(["--output", str(mixed / "runs"), "--date", "2026-01-02"]) == 65
    assert "`python -m fusion.ensemble RUN RUN --output" in capsys.readouterr().err


def test_an_ensemble_of_one_recipe_has_equal_weights(copied: Path, capsys: Capture) -> None:
    assert ensemble.main(["q0", "q1", "--output", str(copied), "--run-id", "folds", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [member["weight"] for member in said["members"]] == [0.5, 0.5] and not said["fitted"]
    assert said["smape"] == said["equal_smape"] == said["best_member_smape"]
    assert "so all recipes have the same weight" not in (copied / "runs/folds/model_card.md").read_text()
    assert wrong(copied) == []


def test_an_ensemble_in_a_bucket(bucket: str, mixed: Path, catalog: Path) -> None:
    upload(mixed, bucket)
    storage.remove(f"{bucket}/runs/mix")
    storage.remove(f"{bucket}/pointers/runs/ensemble")
    assert ensemble.main([*FOLDS, "--output", bucket, "--run-id", "mix"]) == 0
    assert storage.read(f"{bucket}/runs/mix/ensemble.json") == (mixed / "runs/mix/ensemble.json").read_bytes()
    assert predict_test.main(["--output", bucket, "--date", "2026-01-02", "--data", str(catalog)]) == 0
    assert [str(one) for one in verify(bucket) if one.verdict == "BAD"] == []


def test_if_changed_submits_only_if_something_has_changed(copied: Path, capsys: Capture) -> None:
    flags = ["--cluster=local", "--task=predict", "--variant=ensemble", "--nproc-per-node=1", "--if-changed"]
    flags += ["--", "--output", str(copied), "--device", "cpu", "--date"]
    assert submit.main([*flags, "2026-01-02"]) == 0
    assert "nothing has changed" not in capsys.readouterr().out
    assert submit.main([*flags, "2026-01-03"]) == 0
    assert f"nothing has changed: {copied}/submissions/test/2026-01-03/" in capsys.readouterr().out
    assert wrong(copied) == []
