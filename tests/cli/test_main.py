"""The command `fusion` runs the module of each subcommand: `pytest tests/cli/test_main.py`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fusion.cli.commands import COMMANDS
from fusion.cli.main import main
from fusion.errors import Parser, UsageError
from fusion.terminal.spelling import as_typed, subcommands
from fusion.variants import variants

EVALUATED = pytest.mark.parametrize("command", ["evaluate", "predict"])


@pytest.fixture(autouse=True)
def _typed_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fusion"])


def said(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main(words.split())
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("words", ["", "--help", "--help-all", "-h", "help"])
def test_the_overview_names_every_command_on_one_screen(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(words, capsys)
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80
    assert {name for name in COMMANDS if not any(line.startswith(f"  {name} ") for line in lines)} == set()


def test_every_command_has_a_module_with_main() -> None:
    for command in COMMANDS.values():
        for variant in variants() if command.of_variant else [""]:
            module = command.module.format(variant=variant)
            assert find_spec(module), module


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("trai", 64, "did you mean train? `fusion --help` lists the commands"),
        ("train", 64, "train needs a variant: all_embeddings, qwen_clip"),
        ("train", 64, "for example `fusion train all_embeddings --data "),
        ("train qwen-clip", 64, "did you mean qwen_clip? the variants are all_embeddings, qwen_clip"),
        ("evaluate ensemble", 64, "there is no variant 'ensemble'"),
        ("train qwen_clip --epoch 3", 64, "did you mean --epochs? `fusion train qwen_clip --help-all` lists"),
        ("train qwen_clip --epochs 0", 78, "--epochs is '0'"),
        ("predict ensemble --output nowhere", 65, "`fusion ensemble RUN RUN --output nowhere` makes one"),
        ("compare", 64, "for example `fusion compare my-run-1 my-run-2"),
        ("pull", 64, "for example `fusion pull runs --output s3://my-bucket/output`"),
        ("pull run x --output nowhere", 65, "`fusion pull runs --output nowhere` lists what is there"),
        ("jobs", 64, "for example `fusion jobs list`"),
        ("submit", 64, "for example `fusion submit --cluster local -- "),
        ("launch", 64, "`fusion launch --help-all` lists all flags"),
    ],
)
def test_errors_name_what_can_be_typed(
    words: str,
    code: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, err = said(words, capsys)
    assert (found, expected in err) == (code, True), err
    assert "Traceback" not in err and "python -m" not in err


@EVALUATED
def test_the_only_variant_of_an_output_need_not_be_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "pointers" / "runs" / "qwen_clip").mkdir(parents=True)
    assert "no finished run of qwen_clip under output" in said(command, capsys)[2]
    (tmp_path / "output" / "pointers" / "runs" / "all_embeddings").mkdir()
    code, _, err = said(command, capsys)
    assert code == 64 and "there are runs of all_embeddings and qwen_clip under output" in err


@pytest.mark.parametrize("words", ["train --help", "train --help-all", "help train"])
def test_help_without_a_variant_names_the_variants(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(words, capsys)
    assert code == 0 and "  fusion train qwen_clip --help" in out


def test_help_of_a_subcommand_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("compare --help", "pull run --help", "train qwen_clip --help"):
        code, out, _ = said(words, capsys)
        assert code == 0 and out.startswith(f"usage: fusion {words.removesuffix(' --help')} ")
        assert "python -m fusion.compare" not in out


@pytest.mark.parametrize("words", ["version", "--version"])
def test_the_version_names_torch_without_loading_it(words: str) -> None:
    code = f"import sys; from fusion.cli.main import main; main(['{words}']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["fusion", "revision", "python", "torch"]


def test_python_m_fusion_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fusion", "trai"], capture_output=True, text=True, check=False)
    assert done.returncode == 64 and "`python -m fusion --help` lists the commands" in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m fusion | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_overview_loads_no_library() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fusion"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fusion.cli.main" in imported and not {"torch", "pandas", "fsspec", "pydantic"} & imported


def test_commands_that_were_started_as_modules_are_named_as_modules() -> None:
    text = "`python -m fusion.qwen_clip.train`, `python jobs/pull.py runs`, python -m fusion.launch fusion.x.train"
    assert as_typed(text) == text
    with subcommands("fusion"):
        assert as_typed(text) == "`fusion train qwen_clip`, `fusion pull runs`, fusion launch fusion.x.train"
        with pytest.raises(UsageError, match="unrecognized") as caught:
            Parser("python -m fusion.convert").parse_args(["--x"])
    assert caught.value.remedy == "`fusion convert --help` lists all flags"


def test_without_a_checkout_scripts_are_named_as_subcommands(tmp_path: Path) -> None:
    """As where only the wheel is installed, and a user has started `python -m fusion.jobs.pull`."""
    for name in ("__init__.py", "terminal/__init__.py", "terminal/spelling.py"):
        (tmp_path / "fusion" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(__file__).parents[2] / "fusion" / name, tmp_path / "fusion" / name)
    code = "from fusion.terminal.spelling import as_typed; print(as_typed('run `python jobs/pull.py runs`'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "run `fusion pull runs`\n"
