from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from fusion import log
from fusion.all_embeddings import train
from tests.conftest import SMALL

LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ info run=r rank=0/2 event=x text=\"a b\" loss=0\.123457\n"


def test_a_line_consists_of_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("r", 0, 2)
    log.info(event="x", text="a b", loss=0.123456789)
    said = capsys.readouterr().err
    assert re.fullmatch(LINE, said)
    assert log.text().endswith(said)


def test_a_separate_log_keeps_its_own_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("outer", 0, 1)
    before = log.text()
    with log.separate("warning", short=True):
        log.configure("inner", 1, 2)
        log.configure("inner", 0, 1)
        log.info(event="kept")
        log.warning(event="shown")
        assert [line.split()[2:] for line in log.text().splitlines()] == [
            ["run=inner", "rank=0/1", "event=kept"],
            ["run=inner", "rank=0/1", "event=shown"],
        ]
        assert log.is_separate()
    assert log.text() == before and not log.is_separate()
    assert re.fullmatch(r"\d\d:\d\d:\d\d \S*warning\S* shown\n", capsys.readouterr().err)


def test_special_characters_in_values_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    log.info(a='say "x"', b="k=v", c="two\nlines \x1b[31m", d="plain-\u00e9")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r'a="say \"x\"" b="k=v" c="two\nlines \u001b[31m" d=plain-' + "\u00e9")


def test_ranks_other_than_0_print_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("r", 1, 2)
    log.info(event="x")
    log.warning(event="y")
    with log.progress("epoch", 3) as show:
        show(1)
    assert "rank=1/2 event=y" in capsys.readouterr().err.splitlines()[0]
    log.configure("-", 0, 1)


def test_a_terminal_shows_short_lines_and_one_progress_bar(catalog: Path, tmp_path: Path) -> None:
    output = tmp_path / "terminal"
    flags = ["--data", str(catalog), "--output", str(output), *SMALL, "--epochs", "2", "--run-id", "r"]
    command = [sys.executable, "-m", "fusion.all_embeddings.train", *flags, "--checkpoint-steps", "1"]
    ours, theirs = pty.openpty()
    job = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    said = b"".join(iter(lambda: read(ours), b"")).decode()
    os.close(ours)
    assert job.wait(60) == 0
    # Cursors are hidden and shown again by each bar. On a slow machine, other stages have bars too.
    before, epochs = said[: said.index("epoch 1/2 ")], said[said.index("epoch 1/2 ") : said.rindex("epoch 2/2 ")]
    assert before.count("\x1b[?25l") == before.count("\x1b[?25h") + 1, "the bar has appeared"
    assert "\x1b[?25" not in epochs, "one bar for all epochs"
    assert re.search(r"epoch 2/2 \d+/\d+ loss \S+ smape \S+ best \S+ 0:00:0\d left", said)
    assert re.search(r"\d\d:\d\d:\d\d info finished checkpoint=", said) and "run=r" not in said
    stored = (output / "runs/r/attempts/1/log.txt").read_text()
    assert re.search(r"Z info run=r rank=0/1 event=finished ", stored) and "\x1b" not in stored


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Replaces standard error by a fake terminal. Not a fixture, as pytest replaces the stream after fixtures."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_no_bar_is_left_by_a_line_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, ended = terminal(monkeypatch), threading.Event()
    log.configure("r", 0, 1)

    def write_lines() -> None:
        while not ended.wait(0.0002):
            log.info(event="line")

    writer = threading.Thread(target=write_lines)
    writer.start()
    for _ in range(200):
        with log.progress("a bar", 3) as show:
            show(1)
    ended.set()
    writer.join()
    bars = stream.getvalue().split("\x1b[?25l")[1:]
    assert len(bars) == 200 and all("a bar" in bar for bar in bars)
    assert not any("a bar" in bar.split("\x1b[?25h")[1] for bar in bars)


def test_a_terminal_shows_short_lines_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    log.configure("r", 0, 1)
    log.info(epoch=1, event="x", text="a b")
    log.warning(event="y")
    log.error(event="two\nlines")
    shown = [line.split(" ", 1) for line in stream.getvalue().splitlines()]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", time) for time, _ in shown)
    assert [rest for _, rest in shown] == [
        'info x epoch=1 text="a b"',
        "\x1b[33mwarning\x1b[0m y",
        '\x1b[31merror\x1b[0m "two\\nlines"',
    ]
    assert re.search(r"Z info run=r rank=0/1 epoch=1 event=x", log.text())
    log.configure("-", 0, 1)


def test_a_terminal_names_the_rank_only_where_it_could_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    log.configure("r", 0, 2)
    log.info(event="x", seconds=1234.5678, lr=0.00123456)
    log.warning(event="y")
    log.configure("-", 0, 1)
    shown = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert shown == ["info x seconds=1235 lr=0.001235", "\x1b[33mwarning\x1b[0m y rank=0/2"]
    assert "rank=0/2 event=x seconds=1234.57" in log.text()


def test_a_line_that_is_wider_than_the_terminal_goes_on_below() -> None:
    words = ["12:34:56 info", "loaded", "role=clip_image", "source=img_efflite0", "rows=8000"]
    assert log._folded(words, 40).splitlines() == [
        "12:34:56 info loaded role=clip_image",
        "         source=img_efflite0 rows=8000",
    ]
    assert log._folded(words, 0) == " ".join(words)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    stream = terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    log.configure("r", 1, 2)
    log.warning(event="y")
    assert stream.getvalue()[8:] == " warning y rank=1/2\n"
    log.configure("-", 0, 1)


def test_lines_of_epochs_show_step_and_total(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(catalog), "--output", str(tmp_path), *SMALL, "--epochs", "3", "--run-id", "r"]
    assert train.main(flags) == 0
    steps = pd.read_csv(tmp_path / "runs/r/metrics/epochs.csv")["step"].tolist()
    assert steps == [steps[0], 2 * steps[0], 3 * steps[0]]
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if " smape=" in line and " rows_s=" in line]
    assert [line[5] for line in lines] == [f"step={step}/{steps[-1]}" for step in steps]


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""
