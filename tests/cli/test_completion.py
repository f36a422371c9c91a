"""Completion of `fusion` in a real bash: `pytest tests/cli/test_completion.py`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fusion.cli.commands import COMMANDS
from fusion.cli.completion import fish, main, words, zsh
from fusion.errors import Parser
from fusion.jobs import control, pull

# Completes the words that follow it, as bash does when Tab is pressed behind the last one.
COMPLETE = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _fusion; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    return words()


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["bash"]) == 0
    made = tmp_path / "fusion.bash"
    made.write_text(capsys.readouterr().out)
    return made


def test_bash_completes_commands_variants_and_flags(script: Path) -> None:
    def completed(*typed: str) -> list[str]:
        command = ["bash", "-c", COMPLETE, "-", str(script), "fusion", *typed]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert completed("tr") == ["train"]
    assert completed("train", "") == ["all_embeddings", "qwen_clip"]
    assert completed("predict", "e") == ["ensemble"]
    assert completed("train", "qwen_clip", "--ep") == ["--epochs"]
    assert completed("train", "qwen_clip", "--epochs", "3", "--drop") == ["--drop-bad-prices", "--dropout"]
    assert completed("pull", "") == list(COMMANDS["pull"].verbs)
    assert completed("pull", "run", "--st") == ["--store-timeout", "--state"]
    assert completed("completion", "") == ["bash", "zsh", "fish"]


def test_bash_registers_the_completion(script: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"source {script}; complete -p fusion"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "complete -o default -F _fusion fusion\n"


@pytest.mark.parametrize(("name", "parser"), [("pull", pull._parser()), ("jobs", control._parser())])
def test_the_verbs_are_those_of_the_command(name: str, parser: Parser) -> None:
    (verbs,) = [list(action.choices) for action in parser._actions if isinstance(action.choices, dict)]
    assert set(verbs) == set(COMMANDS[name].verbs)


def test_every_command_has_words(table: dict[str, list[str]]) -> None:
    for command in COMMANDS.values():
        assert table[command.name], command.name


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_of_another_shell_has_every_word(shell: str, table: dict[str, list[str]]) -> None:
    text = {"zsh": zsh, "fish": fish}[shell](table)
    missing = {word for found in table.values() for word in found if word.removeprefix("--") not in text}
    assert missing == set()
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_an_unknown_shell_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tcsh"]) == 64
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
