"""`fusion.verify` passes an unchanged output, and names each kind of damage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy

from fusion import storage
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.records import manifests
from fusion.records.run import RunFolder
from fusion.verify.__main__ import main
from tests.conftest import SMALL, run_command, upload
from tests.documents import edit

Capture = pytest.CaptureFixture[str]
POINTER = "pointers/submissions/test/current.json"
PLACES = {"weights": "model.safetensors", "state": "state.pt", "submission": "submission.csv"}


@pytest.fixture(scope="module")
def made(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with a run and its submission."""
    output = tmp_path_factory.mktemp("made")
    flags = ["--data", str(catalog), "--output", str(output), "--run-id", "r", *SMALL]
    assert train.main([*flags, "--epochs", "2", "--checkpoint-steps", "3"]) == 0
    assert evaluate_by_groups.main(["--output", str(output), "--run-id", "r"]) == 0
    assert predict_test.main(["--output", str(output), "--run-id", "r", "--date", "2026-01-02"]) == 0
    return output


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """A copy to damage; its submission names the original run."""
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def newest(output: Path) -> Path:
    return Path(RunFolder(str(output / "runs/r")).checkpoints()[-1].url)


def submission(output: Path) -> Path:
    return output / "submissions" / json.loads((output / POINTER).read_text())["submission"]


def republish(folder: Path, content: bytes) -> Path:
    """The submission with other content, and digests that fit it."""
    other = folder.with_name(storage.sha256(content)[:12])
    folder.rename(other)
    (other / "submission.csv").write_bytes(content)
    entry = {"key": "submission.csv", "bytes": len(content), "sha256": storage.sha256(content)}
    edit(other / "MANIFEST.json", files=[entry])
    return other


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def wrong_lines(capsys: Capture, url: Path | str, code: int = 65) -> list[str]:
    """Runs the command; the lines that begin with BAD."""
    capsys.readouterr()
    assert main([str(url)]) == code
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith("BAD  ")]
    assert {line[:5] for line in lines[:-1]} <= {"ok   ", "BAD  ", "note "}
    assert lines[-1].startswith(f"{len(wrong)} thing" if wrong else "OK")
    return wrong


def test_an_unchanged_output_passes(made: Path, capsys: Capture) -> None:
    for url in (made / "runs/r", newest(made), submission(made), f"{made}/{POINTER}", f"{made}/runs/r/"):
        assert wrong_lines(capsys, url, code=0) == []
    assert main([f"{made}/{POINTER}"]) == 0
    said = capsys.readouterr().out
    assert "not compared" not in said
    for what in ("header: sample_id,price", "ids: each once", "prices are plain", "in its order", "model_sha256"):
        assert what in said


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_a_damaged_file_is_named(what: str, harm: Callable[[Path], None], output: Path, capsys: Capture) -> None:
    folder = submission(output) if what == "submission" else newest(output)
    harm(folder / PLACES[what])
    first = wrong_lines(capsys, folder)[0]
    assert first.startswith(f"BAD  {folder.name}/{PLACES[what]}: expected ") and ", found " in first
    assert ("no such file" in first) == (harm is Path.unlink)
    assert wrong_lines(capsys, f"{output}/{POINTER}" if what == "submission" else output / "runs/r")[0] == first


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "{a},{p}\n",
            "{b},{p}\n",
            "ids: expected each once and not empty, found 1 repeated or empty: {b}",
        ),
        ("{a},{p}\n", ",{p}\n", "ids: expected each once and not empty, found 1 repeated or empty: "),
        ("{a},{p}\n", "{a},nan\n", "prices: expected plain finite numbers above 0, found 1 others: {a},nan"),
        ("{a},{p}\n", "{a},0.0000\n", "found 1 others: {a},0.0000"),
        ("{a},{p}\n", "{a},-1\n", "found 1 others: {a},-1"),
        ("{a},{p}\n", "{a},1e3\n", "found 1 others: {a},1e3"),
        ("{a},{p}\n", "{a},{p},1\n", "found 1 others: {a},{p},1"),
        ("{a},{p}\n", "", "rows: expected"),
        ("{a},{p}\n", "tensor({a}),{p}\n", "1 missing ({a}), 1 others (tensor({a}))"),
        ("{a},{p}\n", "\x1b[2J{a},{p}\n", r"1 others (\x1b[2J{a})"),
        ("sample_id,price\n", "id,price\n", "header: expected sample_id,price, found id,price"),
        ("sample_id,price\n", "sample_id,price\n\n", "found 1 others"),
    ],
)
def test_finds_a_wrong_submission_whose_digests_match(
    old: str, new: str, said: str, output: Path, capsys: Capture
) -> None:
    folder = submission(output)
    content = (folder / "submission.csv").read_text()
    (a, p), (b, _) = (line.split(",") for line in content.splitlines()[1:3])
    old, new, said = (text.format(a=a, b=b, p=p) for text in (old, new, said))
    wrong = wrong_lines(capsys, republish(folder, content.replace(old, new, 1).encode()))
    assert any(said in line for line in wrong), wrong
    assert not any("sha256" in line for line in wrong)


@pytest.mark.parametrize("name", ["groups.csv", "summary.json", "predictions.parquet"])
def test_damaged_metrics_are_named(name: str, output: Path, capsys: Capture) -> None:
    flip(output / "runs/r/metrics" / name)
    (line,) = wrong_lines(capsys, output / "runs/r")
    assert line.startswith(f"BAD  metrics/{name}: expected ")


def test_finds_a_split_that_differs_from_that_of_the_training(output: Path, capsys: Capture) -> None:
    split = output / "runs/r/split.parquet"
    frame = pd.read_parquet(split)
    frame.iloc[::-1].to_parquet(split, index=False)
    wrong = wrong_lines(capsys, output / "runs/r")
    assert any("split_sha256 of split.parquet" in line for line in wrong)
    assert all("split.parquet" in line for line in wrong), "all findings are comparisons with the split"


def test_a_changed_test_csv_is_not_an_error(catalog: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(catalog, tmp_path / "data")
    where = ["--run-dir", str(made / "runs/r"), "--output", str(tmp_path), "--data", str(tmp_path / "data")]
    assert predict_test.main(where) == 0
    table = (tmp_path / "data/test.csv").read_text().splitlines(keepends=True)
    (tmp_path / "data/test.csv").write_text("".join(table[:-1]))
    assert main([f"{tmp_path}/{POINTER}"]) == 0
    assert main([f"{tmp_path}/{POINTER}", "--data", str(tmp_path / "data")]) == 65


def test_finds_rows_in_another_order_than_test_csv(output: Path, capsys: Capture) -> None:
    folder = submission(output)
    header, *rows = (folder / "submission.csv").read_text().splitlines(keepends=True)
    (line,) = wrong_lines(capsys, republish(folder, "".join([header, *rows[::-1]]).encode()))
    assert "found the same ids, in another order" in line


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_sha256": "0" * 64}, "BAD  model_sha256, as in step-"),
        ({"rows": 1}, "BAD  submission.csv: rows: expected 1, found "),
        ({"rows": "many"}, "expected rows for which"),
        ({"files": []}, "expected submission.csv, found no files"),
        ({"files": [{"key": "../x", "bytes": 1, "sha256": "0" * 64}]}, "expected files.0.key for which"),
        ({"files": [{"key": "submission.csv", "bytes": 1}]}, "expected files.0.sha256, found nothing of that name"),
    ],
)
def test_finds_a_manifest_with_wrong_values(values: dict[str, Any], said: str, output: Path, capsys: Capture) -> None:
    edit(submission(output) / "MANIFEST.json", **values)
    (line,) = wrong_lines(capsys, f"{output}/{POINTER}")
    assert said in line


def test_finds_a_submission_in_the_folder_of_another_digest(output: Path, capsys: Capture) -> None:
    other = submission(output).rename(submission(output).with_name("0" * 12))
    (line,) = wrong_lines(capsys, other)
    assert line.startswith("BAD  folder's digest: expected ") and line.endswith("found 000000000000")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data_sha256": "1" * 64}, "data_sha256 of run.json: expected"),
        ({"config_sha256": "1" * 64}, "config_sha256 of run.json: expected"),
        ({"step": 1}, "step of the manifest: expected step-"),
        ({"files": []}, "expected model.safetensors and state.pt, found no files"),
        ({"finished": "yes"}, "expected finished for which input should be a valid boolean, found 'yes'"),
    ],
)
def test_finds_a_checkpoint_of_another_run(values: dict[str, Any], said: str, output: Path, capsys: Capture) -> None:
    folder = newest(output)
    edit(folder / "MANIFEST.json", **values)
    (line,) = wrong_lines(capsys, output / "runs/r")
    assert folder.name in line and said in line


@pytest.mark.parametrize(("key", "what"), [("lr", "config_sha256"), ("data", "config_json_sha256")])
def test_finds_settings_that_the_run_was_not_trained_with(key: str, what: str, output: Path, capsys: Capture) -> None:
    path = output / "runs/r/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 0.5 if key == "lr" else "elsewhere"}))
    (line,) = wrong_lines(capsys, output / "runs/r")
    assert line.startswith(f"BAD  config.json: {what} of run.json: expected ")


def test_finds_weights_without_dims_whose_digests_match(output: Path, capsys: Capture) -> None:
    path = newest(output) / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dims"', b'"dime"', 1))
    content = path.read_bytes()
    entry = {"key": path.name, "bytes": len(content), "sha256": storage.sha256(content)}
    manifest = json.loads((newest(output) / "MANIFEST.json").read_text())
    edit(newest(output) / "MANIFEST.json", files=[entry, *manifest["files"][1:]])
    (line,) = wrong_lines(capsys, newest(output))
    assert "model.safetensors: header: expected tensors, and in its metadata the dims of every role" in line


def one_side(path: Path) -> None:
    pd.read_parquet(path).assign(side="train").to_parquet(path, index=False)


def doubled(path: Path) -> None:
    rows = pd.read_parquet(path)
    pd.concat([rows, rows.head(1)]).to_parquet(path, index=False)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("split.parquet", one_side, "sides: expected train and validation, found train"),
        ("split.parquet", doubled, "ids: expected each once"),
        ("split.parquet", truncate, "expected Parquet with sample_id and side"),
        ("split.parquet", Path.unlink, "found no such file"),
        ("config.json", truncate, "expected JSON, found Invalid JSON"),
        ("run.json", truncate, "expected JSON, found Invalid JSON"),
        ("run.json", Path.unlink, "found no such file"),
    ],
)
def test_finds_missing_or_damaged_files_of_the_start_of_a_run(
    name: str, harm: Callable[[Path], None], said: str, output: Path, capsys: Capture
) -> None:
    harm(output / "runs/r" / name)
    line, *others = wrong_lines(capsys, output / "runs/r")
    assert line.startswith(f"BAD  {name}") and said in line
    assert all("split_sha256" in other for other in others), "one finding per checkpoint"


def other_arrays(path: Path, without: Sequence[str] = (), **changes: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes a memory, or leaves arrays out, and states the new digest in all checkpoints, as its functions would."""
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = safetensors.numpy.load_file(path)
    arrays |= {name: np.ascontiguousarray(change(arrays[name])) for name, change in changes.items()}
    arrays = {name: values for name, values in arrays.items() if name not in without}
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    for folder in (path.parent / "checkpoints").iterdir():
        edit(folder / "MANIFEST.json", memory_sha256=storage.sha256(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("prices", lambda prices: prices[::-1], "prices: expected those of split.parquet, found other values"),
        ("ids", lambda ids: np.roll(ids, 7), "ids: expected those of split.parquet, found other values"),
        ("folds", lambda folds: np.roll(folds, 1), "folds: expected those of split.parquet, found other values"),
        ("groups", lambda groups: groups + 1, "groups: expected those of split.parquet, found other values"),
        ("keys", lambda keys: keys[:, 1:], "columns of its keys: expected 44, found 43"),
        ("keys", lambda keys: keys[1:], "rows: expected 503, as in split.parquet, found 502, 503"),
        ("keys", lambda keys: keys * np.nan, "numbers: expected finite, found others in keys"),
        ("components.qwen_text", lambda one: one[1:], "dims of run.json: expected"),
    ],
)
def test_finds_a_wrong_memory_whose_digests_match(
    name: str, change: Callable[[np.ndarray], np.ndarray], said: str, output: Path, capsys: Capture
) -> None:
    other_arrays(output / "runs/r/memory.safetensors", **{name: change})
    (line,) = wrong_lines(capsys, output / "runs/r")
    assert line.startswith("BAD  memory.safetensors: ") and said in line


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_finds_a_missing_or_damaged_memory(harm: Callable[[Path], None], output: Path, capsys: Capture) -> None:
    harm(output / "runs/r/memory.safetensors")
    lines = wrong_lines(capsys, output / "runs/r")
    assert [line for line in lines if "memory.safetensors" not in line] == []
    assert sum("memory_sha256 of memory.safetensors" in line for line in lines) == 2, "one finding per checkpoint"


def test_notes_what_could_not_be_compared(output: Path, capsys: Capture) -> None:
    run = output / "runs/r"
    edit(submission(output) / "MANIFEST.json", run=str(run), data=str(output / "nowhere"))
    (run / "checkpoints/step-00000099").mkdir()
    (run / "checkpoints/step-00000099/model.safetensors").write_bytes(b"torn by a kill")
    assert main([str(run)]) == 0
    assert "note step-00000099: not committed" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")
    assert main([f"{output}/{POINTER}"]) == 0
    said = capsys.readouterr().out
    assert "note model not compared: " in said and "note ids not compared: neither " in said
    shutil.rmtree(run / "metrics")
    (run / "attempts/1/exit.json").unlink()
    assert main([str(run)]) == 0, "as after a kill before the first checkpoint"
    said = capsys.readouterr().out
    assert "note no committed checkpoint" in said and "note attempts/1: has not ended, or was killed" in said


def test_compares_ids_with_those_of_other_data(catalog: Path, output: Path, capsys: Capture) -> None:
    pd.read_csv(catalog / "test.csv", dtype="str").iloc[1:].to_csv(output / "test.csv", index=False)
    assert main([f"{output}/{POINTER}", "--data", str(output)]) == 65
    assert "found 0 missing (none), 1 others (" in capsys.readouterr().out


def test_a_checkpoint_that_is_removed_during_the_check_is_not_an_error(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    original, gone = storage.read, Path(RunFolder(str(output / "runs/r")).checkpoints()[0].url)
    assert gone != newest(output)

    def read(url: str) -> bytes:
        if url == f"{gone}/{manifests.STATE}" and gone.exists():
            shutil.rmtree(gone)
        return original(url)

    monkeypatch.setattr(storage, "read", read)
    assert main([str(output / "runs/r")]) == 0
    assert f"note {gone.name}: removed while it was read" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["nothing", "runs", POINTER.replace("test", "other"), "runs/r/run.json"])
def test_refuses_other_urls(url: str, made: Path, capsys: Capture) -> None:
    assert main([f"{made}/{url}"]) == 65
    said = capsys.readouterr()
    error, hint = said.err.splitlines()
    assert error.startswith(f"error: {made}/{url} ") and hint.startswith("hint: ") and not said.out


def test_finds_a_pointer_to_a_missing_submission(output: Path, capsys: Capture) -> None:
    shutil.rmtree(submission(output))
    first, second = wrong_lines(capsys, f"{output}/{POINTER}")
    assert first.startswith(f"BAD  {POINTER}: submission: expected one that is committed, found test/")
    assert second.endswith("MANIFEST.json: expected JSON, found no such file")
    edit(output / POINTER, submission="../../secret")
    (line,) = wrong_lines(capsys, f"{output}/{POINTER}")
    assert line.startswith("BAD  pointers/submissions/test/current.json: expected submission for which")


@pytest.mark.parametrize(
    ("name", "date", "said"),
    [
        ("test", "2026-01-03", "date of the manifest: expected 2026-01-03, found 2026-01-02"),
        ("prices", "2026-01-02", "name of the manifest: expected prices, found test"),
    ],
)
def test_finds_a_submission_copied_to_another_date_or_name(
    name: str, date: str, said: str, output: Path, capsys: Capture
) -> None:
    other = output / "submissions" / name / date / submission(output).name
    shutil.copytree(submission(output), other)
    pointer = output / f"pointers/submissions/{name}/current.json"
    pointer.parent.mkdir(exist_ok=True)
    pointer.write_bytes((output / POINTER).read_bytes())
    edit(pointer, submission=f"{name}/{date}/{other.name}", pointer=f"submissions/{name}/current")
    for url in (other, pointer, output):
        (line,) = wrong_lines(capsys, url)
        assert line.endswith(said)


def test_finds_a_copied_pointer(output: Path, capsys: Capture) -> None:
    copy = output / "pointers/runs/qwen_clip/best.json"
    copy.parent.mkdir()
    shutil.copy(output / "pointers/runs/all_embeddings/best.json", copy)
    place, variant = wrong_lines(capsys, copy)
    assert "pointer: expected pointers/runs/qwen_clip/best.json, found pointers/runs/all_embeddings/best" in place
    assert "variant of r: expected qwen_clip, found all_embeddings" in variant


def test_finds_a_changed_smape(output: Path, capsys: Capture) -> None:
    """It decides which model is served, so a change is found even if the digests were recomputed with it."""
    smape = RunFolder(str(output / "runs/r")).checkpoints()[-1].smape
    edit(newest(output) / "MANIFEST.json", smape=1.0)
    recomputed, of_history = wrong_lines(capsys, output / "runs/r")
    assert "validation.parquet: smape of the manifest, recomputed: expected " in recomputed
    assert of_history == f"BAD  {newest(output).name}: last smape of train.jsonl: expected {smape}, found 1.0"
    (line,) = wrong_lines(capsys, output / "pointers/runs/all_embeddings/best.json")[:1]
    assert f"smape of {newest(output).name} in r: expected 1.0, found {smape}" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.assign(predicted=rows["predicted"] * 2), "smape of the manifest, recomputed: expected "),
        (lambda rows: rows.iloc[1:], "ids: expected the validation rows of the split, found others: "),
        (
            lambda rows: rows.assign(sample_id="x"),
            "ids: expected each once and not empty, found 1 repeated or empty: x",
        ),
        (lambda rows: rows.assign(predicted=-1.0), "expected finite prices above 0, found other values"),
        (lambda rows: rows.drop(columns="predicted"), "expected Parquet with sample_id, price and predicted, found "),
    ],
)
def test_finds_wrong_validation_predictions_whose_digests_match(
    change: Callable[[pd.DataFrame], pd.DataFrame], said: str, output: Path, capsys: Capture
) -> None:
    path = newest(output) / "validation.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)
    content, manifest = path.read_bytes(), json.loads((newest(output) / "MANIFEST.json").read_text())
    entry = {"key": path.name, "bytes": len(content), "sha256": storage.sha256(content)}
    others = [one for one in manifest["files"] if one["key"] != path.name]
    edit(newest(output) / "MANIFEST.json", files=[*others, entry])
    lines = wrong_lines(capsys, output / "runs/r")
    assert any(f"{newest(output).name}/validation.parquet" in line and said in line for line in lines), lines


def test_finds_missing_manifests(output: Path, capsys: Capture) -> None:
    for path in (output / "runs/r/checkpoints").glob("*/MANIFEST.json"):
        path.unlink()
    said = wrong_lines(capsys, output / "runs/r")
    assert any("as the newest exit.json says" in line for line in said)
    assert any(line.startswith("BAD  metrics: checkpoint: expected ") for line in said)


@pytest.mark.parametrize("name", ["epochs.csv", "train.jsonl"])
def test_finds_a_history_that_differs_from_the_newest_checkpoint(name: str, output: Path, capsys: Capture) -> None:
    path = output / "runs/r/metrics" / name
    for content in (path.read_bytes()[:-1], path.read_bytes() + b"3,21,0.1,0.1,0.1,0.1\n"):
        path.write_bytes(content)
        (line,) = wrong_lines(capsys, output / "runs/r")
        assert line.startswith(f"BAD  metrics/{name}: expected ")


def test_accepts_documents_of_an_earlier_version(output: Path, capsys: Capture) -> None:
    """Without seals, and without what only seals cover: it is read, and verify says so."""
    new = {"pointer", "config_json_sha256", "run_sha256", "history", "earlier", "log", "name", "previous"}
    new |= {"model_sha256", "data_sha256", "baselines_sha256"}
    (output / "runs/r/baselines.json").unlink()
    for path in output.rglob("*.json"):
        if path.name in ("config.json", "summary.json", "intervals.json"):
            continue
        kept = new - ({"model_sha256", "data_sha256"} if path.parent.name != "metrics" else set())
        document = {key: value for key, value in json.loads(path.read_text()).items() if key not in kept}
        document.pop("sha256")
        if path.parent.name == "metrics":
            document.pop("run_id")
        if document.pop("schema") and path.name == "MANIFEST.json":
            document["schema"] = 1
        path.write_bytes(storage.as_json(document))
    assert wrong_lines(capsys, output, code=0) == []
    assert main([str(output)]) == 0
    assert "note runs/r: run.json: an earlier version wrote it" in capsys.readouterr().out
    assert RunFolder(str(output / "runs/r")).checkpoints()
    where = ["--output", str(output), "--run-id", "r"]
    assert evaluate_by_groups.main(where) == 0
    assert predict_test.main([*where, "--date", "2026-01-04"]) == 0
    assert wrong_lines(capsys, output, code=0) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.unlink(), "baselines_sha256 of baselines.json: expected"),
        (lambda path: edit(path, rows=7), "baselines.json: rows that validate"),
        (lambda path: edit(path, scores=[]), "baselines_sha256 of baselines.json: expected"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"ridge", b"bridge")), "baselines.json: expected"),
    ],
)
def test_finds_changed_baselines(
    output: Path, capsys: Capture, change: Callable[[Path], object], expected: str
) -> None:
    change(output / "runs/r/baselines.json")
    assert any(expected in line for line in wrong_lines(capsys, output))


@pytest.mark.parametrize("flags", [[], ["x", "--stor", "1"], ["x", "--store-timeout", "nan"], ["no-such://x"]])
def test_usage(flags: list[str], capsys: Capture) -> None:
    assert main(flags) == 64
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_on_s3(made: Path, bucket: str, capsys: Capture) -> None:
    upload(made, f"{bucket}/out")
    url = f"{bucket}/out/submissions/{submission(made).relative_to(made / 'submissions')}"
    for place in (f"{bucket}/out/runs/r", f"{bucket}/out/{POINTER}", url):
        assert wrong_lines(capsys, place, code=0) == []
    content = storage.read(f"{url}/submission.csv")
    storage.write(f"{url}/submission.csv", content[:-1])
    assert f"BAD  {url[-12:]}/submission.csv: expected {len(content)} bytes" in wrong_lines(capsys, url)[0]
    assert main(["s3://no-such-bucket/out/runs/r"]) == 65


def test_a_silent_store_and_refused_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for key, value, code in (("AWS_SECRET_ACCESS_KEY", "x", 77), ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1", 69)):
        monkeypatch.setenv(key, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        assert main([f"{bucket}/out/runs/r", "--store-timeout", "0"]) == code
        assert len(capsys.readouterr().err.splitlines()) == 2
    storage.set_patience(60)


def test_the_command_loads_no_torch(made: Path) -> None:
    done = run_command("fusion.verify", f"{made}/{POINTER}")
    assert done.code == 0 and done.out.endswith("\nOK\n") and not done.err
    program = (
        "import sys, fusion.verify.__main__ as v; code = v.main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(made / "runs/r")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
