"""Errors on a terminal: `pytest tests/test_error_display.py`."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from fusion.terminal.error_display import displayed, print_report

LONG = "error: " + "word " * 30 + "end"


def test_lines_are_wrapped_between_words_and_aligned() -> None:
    lines = displayed(LONG, 40, coloured=False).splitlines()
    assert len(lines) > 3 and all(len(line) <= 40 for line in lines)
    assert lines[0].startswith("error: word") and all(line.startswith("       word") for line in lines[1:])


def test_a_command_is_never_broken() -> None:
    command = "`fusion evaluate all_embeddings --output s3://bucket/output --run-id all-embeddings-1f2e3d4c`"
    text = displayed(f"hint: run {command}; or not", 50, coloured=False)
    assert f"\n      {command};\n" in text


def test_other_lines_are_left_as_they_are() -> None:
    assert displayed("Traceback " * 20, 40, coloured=True) == "Traceback " * 20


def test_headings_are_coloured() -> None:
    assert displayed("error: no", 80, coloured=True) == "\x1b[31merror:\x1b[0m no"
    assert displayed("hint: yes", 80, coloured=True) == "\x1b[36mhint:\x1b[0m yes"


def test_text_is_plain_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(LONG)
    assert capsys.readouterr().err == f"{LONG}\n"


@pytest.mark.parametrize(
    ("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_a_command_prints_its_error_once_on_a_terminal(variables: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", **variables}
    environment.pop("NO_COLOR", None) if "NO_COLOR" not in variables else None
    command = [sys.executable, "-m", "fusion.compare", "--nothing"]
    subprocess.run(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, check=False)
    os.close(theirs)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    assert text.count("error:") == 1 and text.count("hint:") == 1
    assert ("\x1b[31merror:\x1b[0m" in text) == coloured == ("\x1b[" in text)
