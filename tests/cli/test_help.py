"""`--help` of every command fits on a screen: `pytest tests/cli/test_help.py`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest

from fusion.cli.commands import COMMANDS, Command
from fusion.cli.main import main
from fusion.errors import Parser
from fusion.terminal.help_screen import MAX_LINES, Rare, first_screen
from fusion.variants import variants


def every() -> Iterator[str]:
    for command in COMMANDS.values():
        yield from _calls(command)


def _calls(command: Command) -> Iterator[str]:
    if command.of_variant:
        yield from (f"{command.name} {variant}" for variant in variants())
    else:
        yield from (command.name, *(f"{command.name} {verb}" for verb in command.verbs))


@pytest.fixture(autouse=True)
def _typed_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fusion"])


def shown(words: str, flag: str, width: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit, match="0"):
        main([*words.split(), flag])
    return capfd.readouterr().out


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("words", [*every(), "predict ensemble"])
def test_the_first_screen_is_short(
    words: str, width: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = shown(words, "--help", width, monkeypatch, capfd).splitlines()
    assert len(lines) <= MAX_LINES and max(map(len, lines)) <= width
    assert lines[0].startswith(f"usage: fusion {words} ") or words in ("version", "demo")


@pytest.mark.parametrize(
    "words", ["train all_embeddings", "evaluate qwen_clip", "predict qwen_clip", "submit", "prepare"]
)
def test_the_first_screen_has_examples_and_counts_what_it_leaves_out(
    words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = shown(words, "--help", 80, monkeypatch, capfd)
    everything = shown(words, "--help-all", 80, monkeypatch, capfd)
    assert text.count(f"    fusion {words} ") >= 2
    left_out = _flags(everything) - _flags(text)
    assert f"{len(left_out)} more flags: --help-all" in text.splitlines()[-1] and _flags(text) < _flags(everything)


def _flags(text: str) -> set[str]:
    return set(re.findall(r"^  (?:-\w, )?(--\S+)", text, re.MULTILINE))


def test_what_training_writes_and_own_sources_are_on_the_first_screen(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = shown("train all_embeddings", "--help", 80, monkeypatch, capfd)
    assert "--data data --sources.clip-image photos" in text and "Writes runs/<run id>/ in --output" in text
    for command in ("evaluate", "predict"):
        text = shown(f"{command} qwen_clip", "--help", 100, monkeypatch, capfd)
        assert "name of the run to use; by default the variant's best in --output" in text and "Writes " in text


def test_paragraphs_that_do_not_fit_are_left_out() -> None:
    parser = Parser("x", description="Purpose.\n\n    x --a 1\n\n" + "word " * 900)
    parser.add_argument("--a", help="first")
    parser.add_argument("--b", help=Rare("second"))
    text = parser.format_help()
    assert "word" not in text and "second" not in text
    assert text.endswith("more about this command and 1 more flag: --help-all\n")
    parser.show_all()
    assert "word" in parser.format_help() and "second" in parser.format_help()


def test_commands_are_continued_at_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    parser = Parser("x", description="Purpose of x.\n\n    x --first value --second value --third value")
    text = first_screen(parser, super(Parser, parser).format_help)
    assert "    x --first value --second value \\\n        --third value\n" in text
