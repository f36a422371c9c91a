"""TensorBoard's own reader finds each epoch once, over stops and kills."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fusion.all_embeddings import train
from fusion.verify.__main__ import verify
from tests.chaos.boundaries import TRACKING, boundaries_of
from tests.tracking.test_tracking import flags, stop_at


def scalars(output: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(output / "runs/r/tensorboard"))
    reader.Reload()
    return [(one.step, one.value) for one in reader.Scalars(tag)]


def segments(output: Path) -> dict[str, str]:
    files = sorted((output / "runs/r/tensorboard").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def straight(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("straight")
    assert train.main(flags(catalog, output, "--tensorboard")) == 0
    return output


def test_each_epoch_is_a_file_that_tensorboard_reads(straight: Path) -> None:
    assert list(segments(straight)) == [f"events.out.tfevents.{epoch:08d}.fusion" for epoch in (1, 2, 3)]
    for tag in ("loss", "smape", "lr", "rows_s", "step"):
        assert [step for step, _ in scalars(straight, tag)] == [1, 2, 3]
    reader = EventAccumulator(str(straight / "runs/r/tensorboard"))
    reader.Reload()
    (config,) = reader.Tensors("config/text_summary")
    assert b'"epochs": 3' in config.tensor_proto.string_val[0]


def test_a_stopped_run_writes_no_epoch_twice(catalog: Path, tmp_path: Path, straight: Path) -> None:
    command = flags(catalog, tmp_path, "--tensorboard")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 16)
        assert train.main(command) == 75
    before = segments(tmp_path)
    assert train.main(command) == 0
    after = segments(tmp_path)
    assert before == {name: after[name] for name in before} and len(after) == 3
    assert scalars(tmp_path, "smape") == scalars(straight, "smape")


KILLED = """
import sys
from tests.chaos.boundaries import Boundary, arm
with open(sys.argv[1], "wb") as reached:
    arm([Boundary("tensorboard-segment", sys.argv[2])], 0, reached)
    from fusion.all_embeddings import train
    train.main(sys.argv[3:])
"""


@pytest.mark.parametrize("when", [boundary.when for boundary in boundaries_of(TRACKING)])
def test_a_run_that_is_killed_at_a_write_has_no_epoch_twice(
    catalog: Path, tmp_path: Path, straight: Path, when: str
) -> None:
    command = flags(catalog, tmp_path / "out", "--tensorboard")
    killed = [sys.executable, "-c", KILLED, str(tmp_path / "reached"), when, *command]
    assert subprocess.run(killed, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert (tmp_path / "reached").read_text() == f"tensorboard-segment:{when}\n"
    before = segments(tmp_path / "out") if when == "after" else {}
    assert train.main(command) == 0
    after = segments(tmp_path / "out")
    assert before == {name: after[name] for name in before} and len(after) == 3
    assert scalars(tmp_path / "out", "smape") == scalars(straight, "smape")


def test_verify_finds_a_damaged_file(straight: Path) -> None:
    findings = [str(finding) for finding in verify(str(straight))]
    assert any("ok" in line and "tensorboard/events.out.tfevents.00000002.fusion" in line for line in findings)
    path = straight / "runs/r/tensorboard/events.out.tfevents.00000002.fusion"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:30], b"", content[:40] + b"x" + content[41:]):
        path.write_bytes(damaged)
        wrong = [str(finding) for finding in verify(str(straight)) if finding.verdict == "BAD"]
        path.write_bytes(content)
        assert len(wrong) == 1 and path.name in wrong[0]


def test_a_missing_package_is_an_error_with_a_command(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusion.tracking.choice.find_spec", lambda _: None)
    assert train.main(flags(catalog, tmp_path, "--tensorboard")) == 78
    assert capsys.readouterr().err.splitlines()[-1] == "hint: pip install tensorboard"
