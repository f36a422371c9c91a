"""Training, evaluation and prediction as users run them, on folders and on S3."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion import storage
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.metrics import compute_metrics, compute_smape
from fusion.records import pointers
from fusion.records.schemas import RunPointer, SubmissionPointer
from tests.conftest import SMALL, Done, run_command, upload
from tests.s3_server import S3Server

VARIANTS = ["qwen_clip", "all_embeddings"]


def chain(variant: str, data: str, output: str, *flags: str, env: Mapping[str, str] | None = None) -> list[Done]:
    jobs = [
        [
            f"fusion.{variant}.train",
            "--data",
            data,
            "--output",
            output,
            *SMALL,
            "--model",
            "fusion",
            "--epochs",
            "3",
            *flags,
        ],
        [f"fusion.{variant}.evaluate_by_groups", "--output", output, "--by", "category"],
        [f"fusion.{variant}.predict_test", "--output", output, "--date", "2026-01-02"],
    ]
    return [run_command(*job, env=env) for job in jobs]


def submission(output: str) -> pd.DataFrame:
    current = pointers.read(SubmissionPointer, output, "submissions", "test", "current")
    assert current is not None
    content = storage.read(f"{output}/submissions/{current.submission}/submission.csv")
    return pd.DataFrame([line.split(",") for line in content.decode().splitlines()[1:]], columns=["sample_id", "price"])


def check_submission(output: str, data: Path) -> None:
    rows, wanted = submission(output), pd.read_csv(data / "test.csv", dtype="str")["sample_id"]
    assert rows["sample_id"].tolist() == wanted.tolist()
    prices = rows["price"].astype(float)
    assert np.isfinite(prices).all() and (prices > 0).all()
    assert rows["price"].str.fullmatch(r"\d+\.\d{4}").all()
    assert prices.nunique() > len(prices) / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_evaluation_and_prediction_write_all_files(variant: str, catalog: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    trained, evaluated, predicted = chain(variant, str(catalog), output)
    assert [step.code for step in (trained, evaluated, predicted)] == [0, 0, 0], trained.err + evaluated.err
    best = pointers.read(RunPointer, output, "runs", variant, "best")
    assert best is not None
    run = Path(output, "runs", best.run_id)
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    folder = f"checkpoints/{best.checkpoint}"
    assert names == {
        "config.json",
        "run.json",
        "lease.json",
        "split.parquet",
        "attempts/1/start.json",
        "attempts/1/exit.json",
        "attempts/1/log.txt",
        "memory.safetensors",
        "baselines.json",
        "report.html",
        "model_card.md",
        *(f"{folder}/{name}" for name in ("model.safetensors", "state.pt", "MANIFEST.json")),
        *(f"{folder}/{name}" for name in ("validation.parquet", "intervals.json")),
        *(f"metrics/{name}" for name in ("train.jsonl", "epochs.csv", "groups.csv", "groups.parquet")),
        *(f"metrics/{name}" for name in ("summary.json", "predictions.parquet", "MANIFEST.json")),
    }
    check_metrics(run, catalog, best.smape)
    check_submission(output, catalog)
    assert "by category" in evaluated.out and "95% interval" in evaluated.out and "Worst rows" in evaluated.out
    assert "event=rows_without_any_embedding" in trained.err


def check_metrics(run: Path, data: Path, smape: float) -> None:
    """Asserts that the reported metrics follow from the stored predictions of the validation rows and their prices."""
    split = pd.read_parquet(run / "split.parquet")
    rows = pd.read_parquet(run / "metrics" / "predictions.parquet")
    assert set(rows["sample_id"]) == set(split.loc[split["side"] == "validation", "sample_id"])
    prices = pd.read_csv(data / "train.csv", dtype={"sample_id": "str"}).set_index("sample_id")["price"]
    assert (rows["price"].to_numpy() == prices[rows["sample_id"]].to_numpy()).all()
    summary = json.loads((run / "metrics" / "summary.json").read_text())
    for name, value in compute_metrics(rows["price"], rows["predicted"]).items():
        assert summary[name] == pytest.approx(value, rel=1e-6)
    assert summary["smape"] == pytest.approx(smape, rel=1e-5)
    assert summary["count"] == len(rows)
    groups = pd.read_csv(run / "metrics" / "groups.csv")
    for name in ("price_bin", "price_range", "present", "category"):
        assert groups.loc[groups["by"] == name, "count"].sum() == len(rows)
    gates = pd.DataFrame(summary["gates"]).set_index("price_bin")
    np.testing.assert_allclose(gates.sum(axis=1), 1, atol=1e-4)


def test_training_evaluation_and_prediction_work_on_s3(bucket: str, s3: S3Server, catalog: Path) -> None:
    upload(catalog, bucket)
    steps = chain("all_embeddings", bucket, f"{bucket}/out", env=s3.environment())
    assert [step.code for step in steps] == [0, 0, 0], "".join(step.err for step in steps)
    check_submission(f"{bucket}/out", catalog)


def test_data_and_output_can_be_given_by_variables(bucket: str, s3: S3Server, catalog: Path) -> None:
    upload(catalog, bucket)
    places = {"FUSION_DATA": bucket, "FUSION_OUTPUT": f"{bucket}/out", "FUSION_EPOCHS": "1"}
    assert run_command("fusion.qwen_clip.train", *SMALL, env=s3.environment() | places).code == 0
    assert pointers.read(RunPointer, f"{bucket}/out", "runs", "qwen_clip", "best") is not None


def test_a_run_on_other_validation_rows_is_served_only_on_request(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "1"]
    for more, is_said in (["--lr", "1e-4"], False), (["--lr", "2e-4"], False), (["--seed", "7"], True):
        assert train.main([*flags, *more]) == 0
        said = capsys.readouterr().err
        assert ("event=not_served" in said and "with --promote" in said) == is_said
    assert train.main([*flags, "--seed", "7", "--promote"]) == 0
    best = pointers.read(RunPointer, str(tmp_path), "runs", "all_embeddings", "best")
    latest = pointers.read(RunPointer, str(tmp_path), "runs", "all_embeddings", "latest")
    assert best is not None and best == latest, "--promote must work for a run that is finished already"


def test_training_is_better_than_the_median(catalog: Path, tmp_path: Path) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--loss", "smape", "--epochs", "25"]
    assert train.main(flags) == 0
    best = pointers.read(RunPointer, str(tmp_path), "runs", "all_embeddings", "best")
    assert best is not None
    split = pd.read_parquet(tmp_path / "runs" / best.run_id / "split.parquet")
    sides = dict(list(split.groupby("side")["price"]))
    naive = compute_smape(sides["validation"], np.full(len(sides["validation"]), sides["train"].median()))
    assert best.smape < 0.85 * naive


def test_validation_rows_and_their_duplicates_do_not_affect_the_weights(catalog: Path, tmp_path: Path) -> None:
    data, models = tmp_path / "data", []
    shutil.copytree(catalog, data)
    for output in (tmp_path / "before", tmp_path / "after"):
        assert train.main(["--data", str(data), "--output", str(output), *SMALL, "--epochs", "1"]) == 0
        models.append(next(output.rglob("model.safetensors")).read_bytes())
        sides = pd.read_parquet(next(output.rglob("split.parquet"))).set_index("sample_id")["side"]
        for path in (data / "embeddings" / "train").glob("*.parquet"):
            rows = pd.read_parquet(path)
            side = sides[rows["sample_id"].astype("str")].to_numpy()
            assert pd.Series(side).groupby([vector.tobytes() for vector in rows["embedding"]]).nunique().max() == 1
            rows.loc[side == "validation", "embedding"] = rows["embedding"] * 2
            rows.to_parquet(path, index=False)
    assert models[0] == models[1]


def test_shuffled_input_files_give_the_same_run(catalog: Path, tmp_path: Path) -> None:
    shuffled = tmp_path / "shuffled"
    shutil.copytree(catalog, shuffled)
    rng = np.random.default_rng(9)
    for path in shuffled.rglob("*.*"):
        if path.suffix == ".csv" and path.stem in ("train", "test"):
            table = pd.read_csv(path, dtype="str")
            table.iloc[rng.permutation(len(table))].to_csv(path, index=False)
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
            table.iloc[rng.permutation(len(table))].to_parquet(path, index=False)
    results = []
    for data in (catalog, shuffled):
        output = str(tmp_path / f"out-{data.name}")
        flags = ["--data", str(data), "--output", output, *SMALL, "--epochs", "2", "--run-id", "r"]
        assert train.main(flags) == predict_test.main(["--output", output]) == 0
        model = next(Path(output).rglob("model.safetensors")).read_bytes()
        results.append((model, dict(submission(output).to_numpy().tolist())))
    assert results[0] == results[1]


def test_a_finished_run_is_not_changed(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "1"]
    assert train.main(flags) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train.main(flags) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    said = capsys.readouterr().err
    assert re.search(r"event=finished_before folder=\S+ smape=\d+", said)
    assert f"fusion.all_embeddings.predict_test --output {tmp_path} --run-id all-embeddings-" in said


def test_a_second_prediction_changes_nothing(catalog: Path, tmp_path: Path) -> None:
    where = ["--output", str(tmp_path)]
    assert train.main(["--data", str(catalog), *where, *SMALL, "--epochs", "1"]) == 0
    assert predict_test.main([*where, "--date", "2026-01-02"]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert predict_test.main([*where, "--date", "2026-01-02"]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_rows_without_any_embedding_get_the_training_median(catalog: Path, tmp_path: Path) -> None:
    where = ["--output", str(tmp_path)]
    assert train.main(["--data", str(catalog), *where, *SMALL, "--epochs", "1"]) == 0
    assert predict_test.main(where) == 0
    wanted = set(pd.read_csv(catalog / "test.csv", dtype="str")["sample_id"])
    for path in (catalog / "embeddings" / "test").glob("*.parquet"):
        rows = pd.read_parquet(path)
        usable = [np.isfinite(np.asarray(vector, np.float32)).all() for vector in rows["embedding"]]
        wanted -= set(rows["sample_id"].astype("str")[usable])
    assert wanted
    split = pd.read_parquet(next(tmp_path.rglob("split.parquet")))
    prices = submission(str(tmp_path)).set_index("sample_id")["price"].astype(float)
    train_rows = split[split["side"] == "train"]
    for sample_id in wanted:
        assert prices[sample_id] == pytest.approx(train_rows["price"].median(), rel=0.02)


def test_warns_when_test_prices_are_known_and_validation_was_too_good(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    where = ["--output", str(tmp_path / "out")]
    assert train.main(["--data", str(data), *where, *SMALL, "--epochs", "1"]) == 0
    test = pd.read_csv(data / "test.csv")
    for price, warned in ((20, None), (1e5, "event=validation_too_good")):
        test.assign(price=price).to_csv(data / "test.csv", index=False)
        assert predict_test.main(where) == 0
        said = capsys.readouterr().err
        assert "event=test_prices" in said
        assert warned is None or warned in said


def test_changed_rows_are_evaluated_only_with_other_data(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    where = ["--output", str(tmp_path / "out"), "--run-id", "r"]
    assert train.main(["--data", str(data), *where, *SMALL, "--epochs", "1"]) == 0
    table = pd.read_csv(data / "train.csv", dtype="str")
    table.assign(shop="x").iloc[::-1].to_csv(data / "train.csv", index=False)
    assert evaluate_by_groups.main([*where, "--by", "shop"]) == 0, "order and further columns may change"
    renumbered = dict(
        zip(table["sample_id"], table["sample_id"].to_numpy()[np.roll(np.arange(len(table)), 1)], strict=True)
    )
    table.assign(sample_id=table["sample_id"].map(renumbered)).to_csv(data / "train.csv", index=False)
    for path in (data / "embeddings" / "train").glob("*.parquet"):
        frame = pd.read_parquet(path)
        ids = frame["sample_id"].astype("str")
        frame.assign(sample_id=ids.map(renumbered).fillna(ids)).to_parquet(path, index=False)
    assert evaluate_by_groups.main(where) == 65
    assert "have other prices or embeddings than in training" in capsys.readouterr().err
    assert evaluate_by_groups.main([*where, "--other-data"]) == 0
    assert json.loads((tmp_path / "out/runs/r/metrics/summary.json").read_text())["as_trained"] is False


def test_evaluation_covers_prices_outside_of_the_usual_range(catalog: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    table = pd.read_csv(data / "train.csv")
    table["price"] = np.where(np.arange(len(table)) % 2, 1e6, 0.004)
    table.to_csv(data / "train.csv", index=False)
    where = ["--output", str(tmp_path / "out")]
    assert train.main(["--data", str(data), *where, *SMALL, "--epochs", "1"]) == 0
    assert evaluate_by_groups.main(where) == 0
    groups = pd.read_csv(next(tmp_path.rglob("groups.csv"))).set_index(["by", "group"])
    assert groups.loc[("price_bin", "20-30"), "count"] == 0
    assert groups.loc[("price_bin", "500+"), "count"] + groups.loc[("price_bin", "0-5"), "count"] > 0
