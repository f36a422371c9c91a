"""Output that cannot be written never changes how a command ends."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from fusion import log
from fusion.terminal.streams import Unfailing
from tests.conftest import SMALL

COMMAND = """
import sys
from fusion.command import guarded
from fusion.errors import DataError

def job():
    for _ in range({lines}):
        print("x" * 100, "\\u00e9")
    raise DataError("wrong \\u00e9", "fix it")

sys.exit(guarded(job))
"""


def broken_pipe() -> IO[str]:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


def full() -> IO[str]:
    return open("/dev/full", "w", buffering=1)


def closed() -> IO[str]:
    stream = io.StringIO()
    stream.close()
    return stream


BROKEN: dict[str, Callable[[], IO[str] | None]] = {
    "nobody reads": broken_pipe,
    "full disk": full,
    "closed": closed,
    "absent": lambda: None,
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised when a broken file is closed
def test_a_line_that_cannot_be_written_is_dropped(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", BROKEN[case]())
    log.info(event="nobody_sees_this", case=case)
    assert f'case="{case}"' in log.text() or f"case={case}" in log.text()  # the log of a run still contains the line


def test_characters_outside_of_the_encoding_are_replaced() -> None:
    below = io.BytesIO()
    stream = Unfailing(io.TextIOWrapper(below, encoding="ascii"))
    stream.write("caf\u00e9\n")
    stream.flush()
    assert below.getvalue() == b"caf?\n"


@pytest.mark.parametrize("lines", [1, 5000])
@pytest.mark.parametrize(
    "shell", ["{} | head -c 1", "{} 2>&1 | head -c 1", "{} >&- 2>&-", "{} 2>&-", "{} >/dev/full 2>/dev/full"]
)
def test_broken_output_does_not_change_the_exit_code(shell: str, lines: int, tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND.format(lines=lines))
    line = shell.format(f"{sys.executable} {script}")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], check=False, capture_output=True, env=environment
    )
    assert done.returncode == 65, done.stderr


def test_a_training_commits_a_checkpoint_after_the_reader_of_its_log_has_ended(catalog: Path, tmp_path: Path) -> None:
    """As in `train 2>&1 | tee train.log` after Ctrl-C, which ends tee at once."""
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "100000", "--patience", "100000"]
    command = [sys.executable, "-m", "fusion.all_embeddings.train", *flags, "--run-id", "r"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert job.stdout is not None
    while b" epoch=1 " not in job.stdout.readline():
        assert job.poll() is None
    job.stdout.close()
    job.send_signal(signal.SIGINT)
    assert job.wait(60) == 75
    assert list(tmp_path.glob("runs/r/checkpoints/*/MANIFEST.json"))
    assert '"code": 75' in (tmp_path / "runs/r/attempts/1/exit.json").read_text()
