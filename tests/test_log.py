from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fusion import log
from fusion.all_embeddings import train
from tests.conftest import SMALL

LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ info run=r rank=0/2 event=x text=\"a b\" loss=0\.123457\n"


def test_a_line_is_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("r", 0, 2)
    log.info(event="x", text="a b", loss=0.123456789)
    said = capsys.readouterr().err
    assert re.fullmatch(LINE, said)
    assert log.text().endswith(said)


def test_a_value_cannot_end_its_line_nor_pass_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    log.info(a='say "x"', b="k=v", c="two\nlines \x1b[31m", d="plain-\u00e9")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r'a="say \"x\"" b="k=v" c="two\nlines \u001b[31m" d=plain-' + "\u00e9")


def test_other_ranks_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("r", 1, 2)
    log.info(event="x")
    log.warning(event="y")
    with log.progress("epoch", 3) as show:
        show(1)
    assert "rank=1/2 event=y" in capsys.readouterr().err.splitlines()[0]
    log.configure("-", 0, 1)


def test_a_terminal_gets_a_bar(catalog: Path, tmp_path: Path) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path / "terminal"), *SMALL, "--epochs", "1"]
    command = [sys.executable, "-m", "fusion.all_embeddings.train", *flags, "--checkpoint-steps", "1"]
    ours, theirs = pty.openpty()
    job = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    said = b"".join(iter(lambda: read(ours), b""))
    os.close(ours)
    assert job.wait(60) == 0
    assert b"epoch 1" in said and b"epoch=1" in said


def test_epochs_say_how_far_they_are(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "3", "--run-id", "r"]
    assert train.main(flags) == 0
    steps = pd.read_csv(tmp_path / "runs/r/metrics/epochs.csv")["step"].tolist()
    assert steps == [steps[0], 2 * steps[0], 3 * steps[0]]
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if " smape=" in line and " rows_s=" in line]
    assert [line[5] for line in lines] == [f"step={step}/{steps[-1]}" for step in steps]


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody writes to it any more
        return b""
