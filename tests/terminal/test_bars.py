"""Bars on a terminal: what they show, that quick work shows none, and that there is one at a time."""

from __future__ import annotations

import time

import pytest

from fusion import log
from tests.test_log import terminal

HIDES_CURSOR = "\x1b[?25l"  # which a bar does when it appears


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("rows", ["500/2,000 rows", "25%"]), ("bytes", ["0.5/2.0 kB", "25%"]), ("", ["25%"])],
)
def test_a_bar_shows_how_much_is_done(monkeypatch: pytest.MonkeyPatch, unit: str, expected: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = terminal(monkeypatch)
    with log.progress("reading", 2000, unit=unit) as show:
        show(500)
        time.sleep(0.3)  # it is drawn ten times per second
    said = stream.getvalue()
    assert "reading" in said and all(text in said for text in expected)


def test_a_bar_of_quick_work_does_not_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    with log.progress("reading", 2000, unit="bytes", delay=30) as show:
        show(500)
    assert stream.getvalue() == ""


def test_slow_work_without_a_size_shows_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    with log.waiting("saving the checkpoint", delay=0.05):
        time.sleep(0.5)
    assert "saving the checkpoint" in stream.getvalue() and "0:00:00" in stream.getvalue()


def test_there_is_one_bar_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    with log.progress("outer", 10), log.progress("inner", 10):
        pass
    with log.progress("next", 10):
        pass
    assert stream.getvalue().count(HIDES_CURSOR) == 2 and "inner" not in stream.getvalue()


def test_a_bar_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    with pytest.raises(ValueError, match="no"), log.progress("reading", 10):
        raise ValueError("no")
    assert stream.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
