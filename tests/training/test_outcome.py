"""How the end of a training is told: one screen on a terminal, one line elsewhere, and the same for a finished run."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.all_embeddings import train
from fusion.all_embeddings.config import Config
from fusion.records.run import RunFolder
from fusion.records.schemas import Baselines, BaselineScore
from fusion.training import outcome
from fusion.training.outcome import Outcome
from tests.conftest import SMALL
from tests.test_log import read

MEDIAN = BaselineScore("median price", 59.5, 57.0, 62.0, 240)
KNOWN = Baselines(2, 60, (MEDIAN, BaselineScore("ridge regression", 45.9, 44.0, 47.0, 240, (30.0,))))


def ended(*history: float, smape: float | None = None, minutes: float | None = 7.2) -> Outcome:
    kept = history[-1] if smape is None else smape
    return Outcome(RunFolder("out/runs/r"), kept, (39.5, 42.5), 1600, history, minutes, KNOWN)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ((60.0,), True),
        ((60.0, 50.0), True),
        ((50.0, 49.9), False),
        ((60.0, 50.0, 45.0, 44.0, 43.9, 44.1, 44.0, 43.9), False),
        ((60.0, 58.0, 56.0, 54.0, 52.0, 50.0, 48.0, 46.0), True),
        ((40.0, 41.0, 42.0, 43.0), False),
    ],
)
def test_a_score_that_still_falls_is_improving(history: tuple[float, ...], expected: bool) -> None:
    assert ended(*history).was_improving is expected
    lines = outcome._remarks(ended(*history), Config(run_id="r", epochs=len(history)))
    assert any(f"--epochs {2 * len(history)}" in line for line in lines) is expected


def test_the_screen_says_how_good_the_run_is_where_it_is_and_what_comes_next() -> None:
    config = Config(output="my folder/out", run_id="r", epochs=3)
    lines = [line.strip() for line, _ in outcome._screen(ended(50.0, 40.0, 41.0), config)]
    assert lines[0] == "r is trained: 3 epochs in 7 min"
    assert "SMAPE 41.00% on 1,600 validation rows (95% interval 39.50 - 42.50)" in lines
    assert "For comparison: median price 59.50%, ridge regression 45.90%" in lines
    assert "Lowest SMAPE 40.00% in epoch 2 of 3, the last weights were kept" in lines
    assert "run      out/runs/r" in lines and "metrics  out/runs/r/metrics/epochs.csv" in lines
    command = "python -m fusion.all_embeddings.evaluate_by_groups --output 'my folder/out' --run-id r"
    assert command in lines
    narrow = [line.strip() for line, _ in outcome._screen(ended(50.0, 40.0, 41.0), config, 80)]
    at = narrow.index("python -m fusion.all_embeddings.evaluate_by_groups \\")
    assert narrow[at + 1] == "--output 'my folder/out' --run-id r"


@pytest.mark.parametrize(("minutes", "expected"), [(0.4, "24 s"), (7.2, "7 min"), (200.0, "3 h 20 min")])
def test_durations_are_in_words(minutes: float, expected: str) -> None:
    assert outcome._duration(minutes) == expected


def test_both_starts_of_a_run_show_the_screen_on_a_terminal(catalog: Path, tmp_path: Path) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "2", "--run-id", "r"]
    first, second = (on_a_terminal("fusion.all_embeddings.train", *flags) for _ in range(2))
    for said in (first, second):
        assert re.search(r"r is trained: 2 epochs in \d+ s", said)
        assert re.search(r"SMAPE \d+\.\d\d% on 101 validation rows \(95% interval", said)
        assert "ridge regression" in said and "Lowest SMAPE" in said
        assert f"run      {tmp_path}/runs/r" in said
        commands = re.sub(r" \\\r\n +", " ", said)  # long ones are folded
        assert f"predict_test --output {tmp_path} --run-id r" in commands
        assert "finished" not in said.split("is trained")[1]
    stored = (tmp_path / "runs/r/attempts/1/log.txt").read_text().splitlines()[-1]
    assert "event=finished" in stored and " improving=" in stored and " smape_low=" in stored


def on_a_terminal(*arguments: str) -> str:
    """What a command prints on a terminal that is both its standard output and error."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    job = subprocess.Popen([sys.executable, "-m", *arguments], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b"".join(iter(lambda: read(ours), b"")).decode()
    os.close(ours)
    assert job.wait(60) == 0, said
    return said


def test_elsewhere_there_is_one_line(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "2", "--run-id", "r"]
    for event in ("finished", "finished_before"):
        assert train.main(flags) == 0
        said = capsys.readouterr()
        (last,) = [line for line in said.err.splitlines() if f"event={event} " in line]
        assert said.out == ""
        for field in ("smape_low", "smape_high", "median_price_smape", "best_epoch", "improving", "minutes"):
            assert f" {field}=" in last


@pytest.mark.parametrize("name", ["baselines.json", "metrics/train.jsonl"])
def test_a_finished_run_with_a_damaged_document_is_still_finished(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "1", "--run-id", "r"]
    assert train.main(flags) == 0
    (tmp_path / "runs/r" / name).write_text("{")
    assert train.main(flags) == 0
    assert "event=run_damaged" in (said := capsys.readouterr().err)
    assert "event=finished_before" in said.splitlines()[-1]
