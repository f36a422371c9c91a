"""What a user sees when something is wrong: an exit code and two lines.

Most commands run in this process, as `main`; those of `run_command` are processes, as a user starts them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fusion.qwen_clip.evaluate_by_groups
import fusion.qwen_clip.predict_test
import fusion.qwen_clip.train
from fusion import storage
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from tests.conftest import SMALL, Done, run_command, upload
from tests.s3_server import READER_KEY, READER_SECRET, S3Server

Damage = Callable[[Path], None]
Main = Callable[[list[str]], int]


def table(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(path, dtype="str")).to_csv(path, index=False)


def embeddings(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_parquet(path)).to_parquet(path, index=False)


def clip(data: Path) -> Path:
    return data / "embeddings" / "train" / "clip_image.parquet"


def halves_of_other_dims(data: Path) -> None:
    rows = pq.read_table(clip(data))
    clip(data).unlink()
    folder = clip(data).with_suffix("")
    folder.mkdir()
    pq.write_table(rows.slice(0, 100), folder / "0.parquet")
    shorter = [vector[:-1] for vector in rows.slice(100).column("embedding").to_pylist()]
    column = pa.array([np.array(vector, np.float16) for vector in shorter], pa.list_(pa.float16(), 11))
    pq.write_table(
        pa.table({"sample_id": rows.slice(100).column("sample_id"), "embedding": column}), folder / "1.parquet"
    )


def price(value: str) -> Damage:
    return lambda data: table(data / "train.csv", lambda t: t.assign(price=[value, *t["price"][1:]]))


BAD_INPUT: dict[str, tuple[Damage, int, str]] = {
    "id twice in the table": (
        lambda data: table(data / "train.csv", lambda t: pd.concat([t, t.head(2)])),
        65,
        "2 ids occur more than once in",
    ),
    "id twice in a source": (
        lambda data: embeddings(clip(data), lambda t: pd.concat([t, t.head(3)])),
        65,
        "3 ids occur more than once in source 'clip_image'",
    ),
    "ids only in a source": (
        lambda data: table(data / "train.csv", lambda t: t.iloc[50:]),
        0,
        "event=ids_not_in_table",
    ),
    "ids missing in a source": (lambda data: embeddings(clip(data), lambda t: t.iloc[100:]), 65, "--max-missing"),
    "no price": (price(""), 65, "1 of 503 rows of"),
    "NaN price": (price("nan"), 65, "--drop-bad-prices"),
    "zero price": (price("0"), 65, "no price above zero"),
    "negative price": (price("-2"), 65, "no price above zero"),
    "dims differ between files": (halves_of_other_dims, 65, "vectors of 11 x float16"),
    "empty file": (lambda data: clip(data).write_bytes(b""), 65, "not a complete Parquet file"),
    "truncated file": (
        lambda data: clip(data).write_bytes(clip(data).read_bytes()[:900]),
        65,
        "not a complete Parquet",
    ),
    "not Parquet": (lambda data: clip(data).write_text("sample_id\n"), 65, "not a complete Parquet file"),
    "column missing": (
        lambda data: table(data / "train.csv", lambda t: t.drop(columns="price")),
        65,
        "no column 'price'",
    ),
    "empty table": (lambda data: (data / "train.csv").write_text(""), 65, "the file is empty"),  # type: ignore[dict-item]
    "no such data": (shutil.rmtree, 65, "train.csv"),
    "no such source": (lambda data: clip(data).unlink(), 65, "--sources.clip-image"),
}


def check_error(done: Done, code: int, expected: str) -> None:
    assert done.code == code, done.err
    assert expected in done.err
    assert "Traceback" not in done.err
    if code:
        assert [line for line in done.err.splitlines() if line.startswith(("error: ", "hint: "))] == (
            done.err.splitlines()[-2:]
        )


class Here:
    """Runs a command in this process; what it sets for all of the process is as before at the end of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(storage, "_patience", storage._patience)
        self.capsys = capsys

    def __call__(self, main: Main, *flags: str) -> Done:
        self.capsys.readouterr()
        code = main(list(flags))
        said = self.capsys.readouterr()
        return Done(code, said.out, said.err)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, catalog: Path, tmp_path: Path, here: Here) -> None:
    damage, code, expected = BAD_INPUT[case]
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    damage(data)
    flags = ["--data", str(data), "--output", str(tmp_path / "out"), *SMALL, "--epochs", "1"]
    check_error(here(train.main, *flags), code, expected)
    if code:
        end = json.loads(next((tmp_path / "out").rglob("exit.json")).read_text())
        assert end["code"] == code and end["error"] and end["hint"]


def test_bad_input_of_a_process(catalog: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    clip(data).write_bytes(clip(data).read_bytes()[:900])
    flags = ["--data", str(data), "--output", str(tmp_path / "out"), *SMALL, "--epochs", "1"]
    check_error(run_command("fusion.all_embeddings.train", *flags), 65, "not a complete Parquet")


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--epoch", "3"], 64, "did you mean --epochs?"),
        (["--sources.clip-imag", "x"], 64, "did you mean --sources.clip-image?"),
        (["--learning-rate", "3"], 64, "did you mean --lr?"),
        (["lr=3e-4"], 64, "did you mean --lr 3e-4?"),
        (["learning_rate=1"], 64, "did you mean --lr 1?"),
        (["--epochs"], 64, "expected one argument"),
        (["extra"], 64, "unrecognized arguments: extra"),
        (["--epochs", "0"], 78, "--epochs is '0': input should be greater than or equal to 1"),
        (["--lr", "fast"], 78, "--lr is 'fast': input should be a valid number"),
        (["--model", "big"], 78, "--model is 'big': input should be 'concat' or 'fusion'"),
        (["--loss", "smap"], 78, "smape"),
        (["--folds", "5", "--fold", "5"], 78, "--fold is 5, expected one of 0..4"),
        (["--width", "30"], 78, "--width 30 is not divisible by --n-heads 8"),
        (["--run-id", "Not OK"], 78, "--run-id is 'Not OK'"),
        (["--config", "missing.json"], 65, "missing.json does not exist"),
        (["--device", "cuda"], 78, "finds no GPU"),
    ],
)
def test_bad_settings(flags: list[str], code: int, expected: str, tmp_path: Path, here: Here) -> None:
    check_error(here(train.main, "--output", str(tmp_path), *flags), code, expected)
    assert not list(tmp_path.rglob("*.json"))


def test_bad_settings_in_the_environment_and_in_a_file(tmp_path: Path, here: Here) -> None:
    check_error(run_command("fusion.qwen_clip.train", env={"FUSION_EPOCHS": "-1"}), 78, "(in the environment)")
    for text, expected in (('{"epoch": 3}', "did you mean epochs?"), ("[1", "not a JSON or TOML file")):
        (tmp_path / "c.json").write_text(text)
        check_error(here(fusion.qwen_clip.train.main, "--config", str(tmp_path / "c.json")), 78, expected)


def test_a_run_with_other_dims_than_the_test_data(catalog: Path, tmp_path: Path, here: Here) -> None:
    data, where = tmp_path / "data", ["--output", str(tmp_path / "out")]
    shutil.copytree(catalog, data)
    assert train.main(["--data", str(data), *where, *SMALL, "--epochs", "1"]) == 0
    path = data / "embeddings" / "test" / "clip_image.parquet"
    embeddings(path, lambda t: t.assign(embedding=[vector[:7] for vector in t["embedding"]]))
    done = here(predict_test.main, *where)
    check_error(done, 65, "clip_image has 7 dimensions")
    assert "the model was trained with 12" in done.err


def test_commands_without_a_run(tmp_path: Path, here: Here) -> None:
    for job in (fusion.qwen_clip.predict_test, fusion.qwen_clip.evaluate_by_groups):
        check_error(here(job.main, "--output", str(tmp_path)), 65, "no finished run of qwen_clip")
        done = here(job.main, "--run-dir", str(tmp_path / "nothing"))
        check_error(done, 65, "config.json does not exist")


def test_a_damaged_model_is_refused(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--output", str(tmp_path)]
    assert train.main(["--data", str(catalog), *where, *SMALL, "--epochs", "1"]) == 0
    model = next(tmp_path.rglob("model.safetensors"))
    content = bytearray(model.read_bytes())
    content[-3] ^= 1
    model.write_bytes(content)
    for job in (evaluate_by_groups, predict_test):
        assert job.main(where) == 65
        assert "model.safetensors is damaged: sha256" in capsys.readouterr().err


def test_the_same_run_id_with_other_settings(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "1", "--run-id", "r"]
    assert train.main(flags) == 0
    assert train.main([*flags, "--seed", "3"]) == 78
    assert "run r exists with seed=41, now it is 3" in capsys.readouterr().err


def test_training_that_diverges(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion.training.trainer.compute_smape", lambda *_: float("nan"))
    assert train.main(["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "1"]) == 70
    end = json.loads(next(tmp_path.rglob("exit.json")).read_text())
    assert end["code"] == 70 and "which is not finite at step" in end["error"]
    assert not list(tmp_path.rglob("MANIFEST.json"))


def test_a_loss_that_is_not_finite_stops_the_run(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion.training.trainer.Fit._train_batch", lambda *_: torch.tensor(float("nan")))
    assert train.main(["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "2"]) == 70
    end = json.loads(next(tmp_path.rglob("exit.json")).read_text())
    assert end["code"] == 70 and "the loss is nan, which is not finite" in end["error"]
    assert not list(tmp_path.rglob("MANIFEST.json"))


def test_an_unknown_column_to_group_by(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--output", str(tmp_path)]
    assert train.main(["--data", str(catalog), *where, *SMALL, "--epochs", "1"]) == 0
    assert evaluate_by_groups.main([*where, "--by", "brand"]) == 65
    assert "no column 'brand'; it has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "code", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 77, "no access to s3://"),
        ({"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET}, 77, "no access to s3://"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, 69, "does not answer"),
        ({"FUSION_OUTPUT": "s3://no-such-bucket/out"}, 65, "s3://no-such-bucket/out"),
        ({"FUSION_DATA": "s3://no-such-bucket/data"}, 65, "s3://no-such-bucket/data"),
    ],
    ids=["wrong secret", "reader", "nobody there", "no output bucket", "no data bucket"],
)
def test_the_store_refuses(
    environment: dict[str, str],
    code: int,
    expected: str,
    bucket: str,
    catalog: Path,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(catalog, bucket)
    places = {"FUSION_DATA": bucket, "FUSION_OUTPUT": f"{bucket}/out", "FUSION_STORE_TIMEOUT": "1"}
    for name, value in {**places, **environment}.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # clients keep what they were made with
    check_error(here(train.main, *SMALL), code, expected)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_the_store_refuses_a_process(bucket: str, s3: S3Server, catalog: Path) -> None:
    upload(catalog, bucket)
    places = {"FUSION_DATA": bucket, "FUSION_OUTPUT": f"{bucket}/out", "AWS_SECRET_ACCESS_KEY": "wrong"}
    done = run_command("fusion.all_embeddings.train", *SMALL, env={**s3.environment(), **places})
    check_error(done, 77, "no access to s3://")


@pytest.mark.parametrize("job", ["train", "evaluate_by_groups", "predict_test"])
def test_help_loads_nothing_slow_and_explains_every_flag(job: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", f"fusion.all_embeddings.{job}", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fusion.config" in imported and not {"torch", "pandas", "pyarrow", "sklearn"} & imported
    assert "--output URL" in done.stdout and "(default: output)" in done.stdout and "--config FILE" in done.stdout


def test_ranks_that_fail_together_report_it_once(catalog: Path, tmp_path: Path) -> None:
    flags = ["--data", str(tmp_path / "nothing"), "--output", str(tmp_path / "out"), *SMALL]
    done = run_command("fusion.all_embeddings.train", *flags, ranks=2)
    assert done.code != 0
    assert done.err.count("error: neither") == 1


@pytest.fixture(scope="module")
def trained(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder with one finished run."""
    output = tmp_path_factory.mktemp("trained")
    assert train.main(["--data", str(catalog), "--output", str(output), *SMALL, "--epochs", "1"]) == 0
    return output


def test_a_run_of_another_variant_is_named(trained: Path, here: Here) -> None:
    (folder,) = (trained / "runs").iterdir()
    for main in (fusion.qwen_clip.predict_test.main, fusion.qwen_clip.evaluate_by_groups.main):
        done = here(main, "--run-dir", str(folder), "--output", str(trained), "--device", "cpu")
        check_error(done, 78, "is of all_embeddings, and this command is of qwen_clip")
        assert "python -m fusion.all_embeddings.predict_test" in done.err


def test_a_prediction_accepts_missing_embeddings(catalog: Path, trained: Path, tmp_path: Path, here: Here) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    path = data / "embeddings" / "test" / "clip_image.parquet"
    embeddings(path, lambda rows: rows.iloc[len(rows) // 10 :])
    flags = ["--output", str(trained), "--data", str(data), "--device", "cpu", "--name", "missing"]
    check_error(here(predict_test.main, *flags), 65, "--max-missing")
    check_error(here(predict_test.main, *flags, "--max-missing", "0.2"), 0, "event=published")
