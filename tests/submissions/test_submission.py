"""Nightly predictions: published once per date, predicted again only if something changed, refused if implausible."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch

from fusion import storage
from fusion.all_embeddings import predict_test, train
from fusion.all_embeddings.config import Config
from fusion.config import PredictConfig
from fusion.data import embeddings
from fusion.records import manifests, pointers
from fusion.records.run import RunFolder
from fusion.records.schemas import RunPointer, SubmissionPointer, seal
from fusion.submissions import submission, unchanged
from fusion.verify.__main__ import verify
from tests.conftest import SMALL
from tests.documents import edit

Night = Callable[..., int]


@pytest.fixture(scope="module")
def trained(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a run on them, in `data` and `output`."""
    workspace = tmp_path_factory.mktemp("trained")
    shutil.copytree(catalog, workspace / "data")
    flags = ["--data", str(workspace / "data"), "--output", str(workspace / "output"), "--run-id", "r", *SMALL]
    assert train.main([*flags, "--epochs", "4"]) == 0
    return workspace


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def night(workspace: Path) -> Night:
    def predict(date: str, *flags: str) -> int:
        where = ["--output", str(workspace / "output"), "--data", str(workspace / "data"), "--device", "cpu"]
        return predict_test.main([*where, "--date", date, *flags])

    return predict


def publications(workspace: Path) -> list[str]:
    """`<date>/<digest>` of all that are committed."""
    found = (workspace / "output/submissions/test").glob("*/*/MANIFEST.json")
    return sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in found)


def current(workspace: Path) -> str:
    pointer = pointers.read(SubmissionPointer, str(workspace / "output"), "submissions", "test", "current")
    assert pointer is not None
    return str(pointer.submission).removeprefix("test/")


def test_the_same_date_twice_publishes_once(workspace: Path, night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    left = workspace / "output/parts/test/0123456789ab-cpu/00000"
    left.parent.mkdir(parents=True)
    left.write_text("of a night that was stopped, and whose input has changed since")
    assert night("2026-03-01") == 0 and not left.exists()
    before = publications(workspace)
    files = {path: path.stat().st_mtime_ns for path in (workspace / "output").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert night("2026-03-01") == 0
    said = capsys.readouterr().err
    assert "event=published_before" in said and "event=model" not in said, "nothing was computed"
    assert publications(workspace) == before == [current(workspace)]
    assert {path: path.stat().st_mtime_ns for path in (workspace / "output").rglob("*") if path.is_file()} == files


def test_an_unchanged_night_publishes_the_same_rows_without_a_model(
    workspace: Path, night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    assert night("2026-03-01") == 0
    capsys.readouterr()
    assert night("2026-03-02") == 0
    assert "event=model" not in capsys.readouterr().err
    first, second = publications(workspace)
    assert (first[:10], second[:10], first[11:]) == ("2026-03-01", "2026-03-02", second[11:])
    assert current(workspace) == second
    findings = verify(str(workspace / "output/pointers/submissions/test/current.json"))
    assert [finding for finding in findings if finding.verdict != "ok"] == []


def test_a_backfill_does_not_become_current(workspace: Path, night: Night) -> None:
    assert night("2026-03-02") == 0
    assert night("2026-02-27") == 0
    assert [name[:10] for name in publications(workspace)] == ["2026-02-27", "2026-03-02"]
    assert current(workspace)[:10] == "2026-03-02"


def test_what_has_changed_is_predicted_again(
    workspace: Path, night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert night("2026-03-01") == 0
    source = workspace / "data/embeddings/test/clip_image.parquet"
    frame = pd.read_parquet(source)
    frame.iloc[1:].to_parquet(source, index=False)
    assert night("2026-03-01") == 0
    assert len(publications(workspace)) == 2, "without one embedding, prices of the same date differ"
    for module in (submission, unchanged):
        monkeypatch.setattr(module, "code_digest", lambda *_: "0" * 64)
    capsys.readouterr()
    assert night("2026-03-02") == 0
    assert "event=model" in capsys.readouterr().err, "other code predicts again"


def test_the_library_detects_an_unchanged_night_without_torch(workspace: Path, night: Night) -> None:
    settings = PredictConfig(output=str(workspace / "output"), data=str(workspace / "data"), date="2026-03-01")
    assert unchanged.published(settings, Config) is None
    assert night("2026-03-01") == 0
    assert (
        unchanged.published(settings, Config)
        == f"{workspace}/output/submissions/test/{current(workspace)}/submission.csv"
    )


def test_a_night_on_other_data_is_not_reused_for_the_runs_own_data(workspace: Path, night: Night) -> None:
    half_the_rows(workspace)
    assert night("2026-03-01") == 0
    assert predict_test.main(["--output", str(workspace / "output"), "--date", "2026-03-02", "--device", "cpu"]) == 0
    rows = pd.read_csv(workspace / "output/submissions/test" / current(workspace) / "submission.csv")
    assert len(rows) == 100, "the rows of the data that the run was trained from"


def half_the_rows(workspace: Path) -> None:
    table = pd.read_csv(workspace / "data/test.csv", dtype="str")
    table.iloc[::2].to_csv(workspace / "data/test.csv", index=False)


def shuffled_ids(workspace: Path) -> None:
    for source in (workspace / "data/embeddings/test").glob("*.parquet"):
        frame = pd.read_parquet(source)
        order = np.random.default_rng(5).permutation(len(frame))
        frame.assign(sample_id=frame["sample_id"].to_numpy()[order]).to_parquet(source, index=False)


def all_alike(workspace: Path) -> None:
    for source in (workspace / "data/embeddings/test").glob("*.parquet"):
        frame = pd.read_parquet(source)
        same = [list(frame["embedding"].dropna().iloc[0])] * len(frame)
        frame.assign(embedding=pd.Series(same, frame.index)).to_parquet(source, index=False)


def a_model_of_nan(workspace: Path) -> None:
    """A committed checkpoint, by its hashes whole, whose weights are not finite."""
    made = RunFolder(str(workspace / "output/runs/r")).best()
    path = Path(made.url, manifests.MODEL)
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    tensors = {name: tensor * float("nan") for name, tensor in safetensors.torch.load_file(path).items()}
    files = {
        manifests.MODEL: safetensors.torch.save(tensors, header["__metadata__"]),
        manifests.STATE: Path(made.url, manifests.STATE).read_bytes(),
    }
    manifest = dataclasses.replace(made.manifest, files=manifests.write_files(made, files))
    storage.write(f"{made.url}/{manifests.MANIFEST}", seal(dataclasses.asdict(manifest)))
    where = (str(workspace / "output"), "runs", Config.variant, "best")
    pointer = pointers.read(RunPointer, *where)
    assert pointer is not None
    model_sha256 = manifest.sha256_of(manifests.MODEL)
    pointers.move(*where, target=dataclasses.replace(pointer, model_sha256=model_sha256))


POISON: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "half the rows": (half_the_rows, 65, "50 rows, the last submission has 100 (--min-rows 0.8)"),
    "shuffled ids": (shuffled_ids, 65, "known products have the clip_image embedding that another one had"),
    "all rows alike": (all_alike, 65, "known products have the clip_image embedding that another one had"),
    "NaN model": (a_model_of_nan, 70, "100 predicted prices are not finite numbers above 0, the first:"),
}


@pytest.mark.parametrize("what", POISON)
def test_implausible_input_is_not_published(
    what: str, workspace: Path, night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    poison, code, message = POISON[what]
    assert night("2026-03-01") == 0
    before, pointed = publications(workspace), current(workspace)
    poison(workspace)
    capsys.readouterr()
    assert night("2026-03-02") == code
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines[0].startswith("error: ") and message in lines[0] and lines[1].startswith("hint: ")
    assert (publications(workspace), current(workspace)) == (before, pointed)
    assert [path for path in (workspace / "output/parts").rglob("*") if path.is_file()] == []
    forced = night("2026-03-02", "--force")
    assert forced == (0 if code == 65 else 70), "prices that are not finite are never published, even with --force"
    assert (current(workspace) == pointed) == (code == 70)


def test_limits_can_be_set_by_flags(workspace: Path, night: Night) -> None:
    assert night("2026-03-01") == 0
    half_the_rows(workspace)
    assert night("2026-03-02", "--min-rows", "0.4") == 0


def test_prices_far_from_the_training_prices_are_not_published(
    workspace: Path, night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace / "output/runs/r/run.json"
    edit(path, price_quartiles=[value * 5 for value in json.loads(path.read_text())["price_quartiles"]])
    assert night("2026-03-01") == 65
    assert "the training prices'" in capsys.readouterr().err
    assert publications(workspace) == []


def test_a_damaged_last_submission_does_not_stop_the_next(
    workspace: Path, night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    assert night("2026-03-01") == 0
    path = workspace / "output/submissions/test" / current(workspace) / "submission.csv"
    whole = path.read_bytes()
    path.write_text("sample_id,price\n")
    assert night("2026-03-01") == 0
    assert "event=submission_damaged" in capsys.readouterr().err
    assert path.read_bytes() == whole, "predicted again from the same model and data"
    path.write_text("sample_id,price\n")
    half_the_rows(workspace)
    assert night("2026-03-02") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--date", "2026-02-30"], "--date is '2026-02-30', expected a day as YYYY-MM-DD"),
        (["--date", "yesterday"], "--date is 'yesterday', expected a day as YYYY-MM-DD"),
        (["--time-zone", "Mars/Phobos"], "--time-zone is 'Mars/Phobos', expected one such as Europe/Berlin"),
    ],
)
def test_rejects_invalid_dates_and_time_zones(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict_test.main(flags) == 78
    assert message in capsys.readouterr().err


def test_the_default_date_follows_the_time_zone() -> None:
    east, west = (PredictConfig(time_zone=f"Etc/GMT{sign}12").day() for sign in ("-", "+"))
    assert east > west, "24 hours apart"


def test_the_date_is_fixed_at_the_start_of_a_night(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nights = (f"2026-03-{day:02}" for day in range(1, 30))
    monkeypatch.setattr(PredictConfig, "day", lambda self: self.date or next(nights))
    assert predict_test.main(["--output", str(workspace / "output"), "--device", "cpu"]) == 0
    assert [name[:10] for name in publications(workspace)] == ["2026-03-01"] == [current(workspace)[:10]]


def empty_the_pointer(workspace: Path) -> None:
    (workspace / "output/pointers/submissions/test/current.json").write_text("{}")


def point_with_a_wrong_key(workspace: Path) -> None:
    (workspace / "output/pointers/submissions/test/current.json").write_text('{"submission": "x"}')


def tear_the_pointer(workspace: Path) -> None:
    (workspace / "output/pointers/submissions/test/current.json").write_text('{"submission": "te')


def remove_what_it_points_to(workspace: Path) -> None:
    shutil.rmtree(workspace / "output/submissions/test" / current(workspace))


def tear_the_manifest(workspace: Path) -> None:
    (workspace / "output/submissions/test" / current(workspace) / "MANIFEST.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [empty_the_pointer, point_with_a_wrong_key, tear_the_pointer, remove_what_it_points_to, tear_the_manifest]
)
@pytest.mark.parametrize("date", ["2026-03-01", "2026-03-02"])
def test_damaged_documents_do_not_prevent_later_nights(
    damage: Callable[[Path], None], date: str, workspace: Path, night: Night
) -> None:
    assert night("2026-03-01") == 0
    damage(workspace)
    assert night(date) == 0
    assert current(workspace)[:10] == date
    findings = verify(str(workspace / "output/pointers/submissions/test/current.json"))
    assert [finding for finding in findings if finding.verdict != "ok"] == []


def test_a_later_date_stays_current_with_a_warning(
    workspace: Path, night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    assert night("2062-01-01") == 0
    assert "event=not_current" not in capsys.readouterr().err
    assert night("2026-03-01") == 0
    assert "event=not_current date=2026-03-01" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["embeddings/test/clip_image.parquet", "test.csv"])
def test_input_that_changes_while_it_is_read_is_refused(
    what: str, workspace: Path, night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = embeddings.fill

    def filled(*arguments: object) -> object:
        path = workspace / "data" / what
        path.write_bytes(path.read_bytes() + (b"111,,,\n" if what == "test.csv" else b""))
        return fill(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "fill", filled)
        assert night("2026-03-01") == 69
    assert "while" in capsys.readouterr().err
    assert publications(workspace) == []


def test_a_damaged_checkpoint_is_skipped(workspace: Path, night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    best = RunFolder(str(workspace / "output/runs/r")).best()
    made = Path(best.url)
    shutil.copytree(made, made.with_name("step-00000001"))
    (made.with_name("step-00000001") / "MANIFEST.json").write_text('{"schema": 1')
    assert night("2026-03-01", "--run-id", "r") == 0
    assert "event=checkpoint_damaged" in capsys.readouterr().err
    shutil.copytree(made, made.with_name("step-00000002"))
    other = seal(dataclasses.asdict(dataclasses.replace(best.manifest, step=2)))
    (made.with_name("step-00000002") / "MANIFEST.json").write_bytes(other)
    (made / "MANIFEST.json").write_text('{"schema": 1')
    os.utime(workspace / "data/test.csv", (0, 0))  # written again: the run is looked at
    assert night("2026-03-02") == 0, "the pointer names the damaged checkpoint, and another exists"
    assert "event=checkpoint_damaged" in capsys.readouterr().err


def test_a_served_run_that_was_deleted_is_an_error(
    workspace: Path, night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(workspace / "output/runs/r")
    assert night("2026-03-01") == 65
    assert "no finished run of all_embeddings" in capsys.readouterr().err
    flags = ["--data", str(workspace / "data"), "--output", str(workspace / "output"), *SMALL, "--epochs", "1"]
    assert train.main(flags) == 0
    assert night("2026-03-01") == 0, "a worse run is the best of the existing runs"
