"""Prediction and evaluation resume after a stop or a kill, and give the same bytes with any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion import storage
from fusion.all_embeddings import train
from fusion.records import pointers
from fusion.records.schemas import SubmissionPointer
from tests.conftest import SMALL, Done, run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("parts")
    flags = ["--data", str(catalog), "--output", str(output), "--run-id", "r", *SMALL]
    assert train.main([*flags, "--epochs", "2"]) == 0
    return output / "runs/r"


def predict(run: str, output: str, ranks: int = 1, strike: str = "") -> Done:
    return in_parts("predict_test", ranks, strike, "--run-dir", run, "--output", output, "--date", "2026-01-02")


def in_parts(command: str, ranks: int, strike: str, *flags: str) -> Done:
    env = {"PYTHONPATH": str(ROOT)} | ({"FUSION_TEST_SIGNAL": strike} if strike else {})
    launcher = ["fusion.launch", "--nproc-per-node", str(ranks), "tests.small_parts", command]
    return run_command(*launcher, *flags, "--device", "cpu", env=env)


def submission(output: str) -> tuple[bytes, ...]:
    """The content of all files of a submission but its manifest, which has the time."""
    current = pointers.read(SubmissionPointer, output, "submissions", "test", "current")
    assert current is not None
    names = ("submission.csv", "predictions.parquet", "fingerprints.parquet")
    return tuple(storage.read(f"{output}/submissions/{current.submission}/{name}") for name in names)


def parts_left(output: Path) -> list[Path]:
    return sorted(path for path in output.rglob("*") if path.is_file() and "parts" in path.relative_to(output).parts)


@pytest.fixture(scope="module")
def expected(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ...]:
    """The submission of one rank that was not interrupted: 100 rows, in 7 parts."""
    output = tmp_path_factory.mktemp("undisturbed")
    done = predict(str(run), str(output))
    assert done.code == 0, done.err
    assert parts_left(output) == [], "parts are removed after the submission is published"
    return submission(str(output))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(
    ranks: int, run: Path, tmp_path: Path, expected: tuple[bytes, ...]
) -> None:
    done = predict(str(run), str(tmp_path), ranks)
    assert done.code == 0, done.err
    assert submission(str(tmp_path)) == expected


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 1), (1, 2)])
def test_a_stopped_prediction_resumes(
    first: int, second: int, run: Path, tmp_path: Path, expected: tuple[bytes, ...]
) -> None:
    stopped = predict(str(run), str(tmp_path), first, "SIGTERM")
    assert stopped.code == 75, stopped.err
    assert f"stopped on request, {2 * first} of 7 parts are done and kept" in stopped.err
    assert not (tmp_path / "pointers").exists()
    assert len(parts_left(tmp_path)) == 2 * first
    again = predict(str(run), str(tmp_path), second)
    assert again.code == 0, again.err
    assert f"event=resumed parts={2 * first}/7" in again.err
    assert submission(str(tmp_path)) == expected


def test_a_prediction_resumes_after_a_killed_rank(run: Path, tmp_path: Path, expected: tuple[bytes, ...]) -> None:
    killed = predict(str(run), str(tmp_path), 2, "SIGKILL")
    assert killed.code not in (0, 75), killed.err
    again = predict(str(run), str(tmp_path), 2)
    assert again.code == 0 and "event=resumed" in again.err, again.err
    assert submission(str(tmp_path)) == expected


def test_a_damaged_part_is_computed_again(run: Path, tmp_path: Path, expected: tuple[bytes, ...]) -> None:
    assert predict(str(run), str(tmp_path), strike="SIGUSR2").code == 75
    for path, damage in zip(parts_left(tmp_path), (lambda b: b[:-1] + b"?", lambda b: b[:50]), strict=True):
        path.write_bytes(damage(path.read_bytes()))
    assert predict(str(run), str(tmp_path)).code == 0
    assert submission(str(tmp_path)) == expected


def test_a_stopped_evaluation_resumes(run: Path) -> None:
    metrics, names = run / "metrics", ("groups.csv", "groups.parquet", "summary.json", "predictions.parquet")
    where = ["--run-dir", str(run)]
    assert in_parts("evaluate_by_groups", 1, "", *where).code == 0
    before = {name: (metrics / name).read_bytes() for name in (*names, "MANIFEST.json")}
    stopped = in_parts("evaluate_by_groups", 2, "SIGTERM", *where)
    assert stopped.code == 75 and len(parts_left(run)) == 4, stopped.err
    assert {name: (metrics / name).read_bytes() for name in before} == before
    again = in_parts("evaluate_by_groups", 1, "", *where)
    assert again.code == 0 and "event=resumed parts=4/7" in again.err, again.err
    assert {name: (metrics / name).read_bytes() for name in before} == before
    assert parts_left(run) == []
