"""The code on the pages of documentation works: blocks are run page by page, and commands are parsed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.tools import commands
from fusion.cli.commands import COMMANDS
from fusion.demo.catalog import generate
from tests.conftest import DIMS
from tests.docs.blocks import LANGUAGES, NOT_RUN, PAGES, ROOT, Block, blocks_of, name_of
from tests.docs.command_lines import wrong_commands

README_LINES = 150
WORDS = NOT_RUN | {"file", "fails", "output"}
RUN = [page for page in PAGES if any(block.runs for block in blocks_of(page))]
ON_CPU = {"FUSION_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:."}
SHELL = [block for page in PAGES for block in blocks_of(page) if block.language == "sh" and not block.runs]


def clean() -> dict[str, str]:
    """This process's variables, without settings of Fusion and keys."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("FUSION_", "AWS_"))}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the programs that pages call: `fusion` and `python`."""
    folder = tmp_path_factory.mktemp("bin")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "-W", "error", "-m", "tests.docs.command_server", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=clean() | ON_CPU, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield folder
        server.kill()


@pytest.fixture(scope="session")
def environment(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for the pages: the programs, a CPU, and a small catalog with a trained run."""
    small = tmp_path_factory.mktemp("small")
    generate(small / "data", n_products=603, dims=DIMS)
    variables = clean() | ON_CPU | {"PATH": f"{programs}:{os.environ['PATH']}", "SMALL_RUN": str(small)}
    train = "fusion train all_embeddings --data data --output output --run-id demo --epochs 5 --batch-size 32"
    done = subprocess.run(train.split(), cwd=small, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return variables


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_blocks_of_the_page_run(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.docs.run_page", name_of(page)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}:{block.line}")
def test_commands_have_only_flags_that_exist(block: Block, capfd: pytest.CaptureFixture[str]) -> None:
    assert wrong_commands(block.text) == [], capfd.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block.page}:{block.line} begins with ```{block.language}"
        assert {word.partition("=")[0] for word in block.words} <= WORDS, f"{block.page}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_within_sentences_exist(page: Path) -> None:
    named = set(re.findall(r"`fusion ([a-z]+)", page.read_text()))
    assert named - set(COMMANDS) == set()


def test_the_page_of_all_commands_is_up_to_date() -> None:
    assert commands.PAGE.read_text() == commands.page(), "write it again with `python -m docs.tools.commands`"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_a_wrong_flag_is_found() -> None:
    assert wrong_commands("export A=1\nfusion train qwen_clip --epoch 3  # comment") == [
        "fusion train qwen_clip --epoch 3"
    ]
    assert wrong_commands("fusion submit --cluster local -- --lr=fast") == [
        "fusion submit --cluster local -- --lr=fast"
    ]
    assert wrong_commands("fusion launch --nproc-per-node 2 fusion.qwen_clip.train --nodes 2") != []
