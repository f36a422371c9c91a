"""Checks of `doctor.py` that need no object store; the data lies in folders, and the command runs in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from fusion.jobs.checks import machine
from fusion.jobs.checks.check import Check, CheckResult, PlannedJob
from fusion.jobs.doctor import main
from tests.conftest import Done
from tests.services import require

ROOT = Path(__file__).parents[2]


def doctor(*flags: str) -> Done:
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(flags)
    return Done(code, out.getvalue(), err.getvalue())


def process(*flags: str, mount: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a mount namespace of its own, after the shell command `mount`."""
    require(os.geteuid() == 0, "root, to mount folders")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "-", sys.executable, "jobs/doctor.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Empty files with the right names: doctor does not open them."""
    for split in ("train", "test"):
        (tmp_path / "data" / "embeddings" / split).mkdir(parents=True)
        (tmp_path / "data" / f"{split}.csv").touch()
        for source in ("cnn", "qwen_text"):
            (tmp_path / "data" / "embeddings" / split / f"{source}.parquet").touch()
    return tmp_path / "data"


def test_a_missing_source_is_named_with_the_flag_that_fixes_it(data: Path) -> None:
    flags = ["--only", "settings", "data", "--data", str(data), "--variant", "qwen_clip"]
    lacking = doctor(*flags)
    assert lacking.code == 65 and "has no clip_image; it has cnn, qwen_text" in lacking.out
    hint = lacking.out.split("name those that are there: ")[1].splitlines()[0]
    found = doctor(*flags, *hint.replace("NAME", "cnn").split())
    assert found.code == 0, found.out
    assert "ok   settings     qwen_clip: sources.clip_image cnn\n" in found.out
    wrong = doctor(*flags, "--sources.clip-imag", "cnn")
    assert wrong.code == 64 and "did you mean --sources.clip-image?" in wrong.err
    without = doctor("--only", "data", "--sources.clip-image", "cnn")
    assert without.code == 64 and "--variant all_embeddings" in without.err
    assert doctor(*flags, "--source.clip-image", "cnn").code == 64


def test_settings_come_from_the_file_that_fusion_config_names(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(f'data = "{data}"\nlr = 0.1\n')
    monkeypatch.setenv("FUSION_CONFIG", str(file))
    found = doctor("--only", "settings", "data")
    assert found.code == 0 and "lr 0.1" in found.out and f"{data} has train, test" in found.out


def test_warns_once_of_a_misspelt_variable(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_EPOCH", "3")
    found = doctor("--data", str(data), "--only", "settings", "data", "gpus", "grace")
    assert found.err.count("did_you_mean=FUSION_EPOCHS") == 1


def test_empty_variables_are_unset_and_empty_flags_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    for name in ("FUSION_DATA", "FUSION_OUTPUT", "FUSION_STORE_TIMEOUT"):
        monkeypatch.setenv(name, "")
    found = doctor("--only", "data", "writable")
    assert found.code == 0 and "ok   data         data has train" in found.out and "below output" in found.out
    refused = doctor("--output", "", "--only", "store")
    assert (refused.code, refused.err.splitlines()[0]) == (78, "error: --output is empty")


def test_control_characters_in_file_names_are_escaped(data: Path) -> None:
    (data / "embeddings" / "train" / "\x1b[2J[b].parquet").touch()
    found = doctor("--data", str(data), "--variant", "qwen_clip", "--only", "data")
    assert "\x1b" not in found.out and r"\x1b[2J[b]" in found.out


def test_warns_of_a_read_only_dev_shm() -> None:
    done = process(
        "--only", "shm", mount="mount -o remount,ro,bind /dev/shm /dev/shm || mount -t tmpfs -o ro t /dev/shm"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("warn shm          /dev/shm cannot be written (Read-only file system)")


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("echo '0, NVIDIA GB10, 580.1, [N/A], [N/A]'", "ok   gpus         1 x NVIDIA GB10, driver 580.1\n"),
        ("echo 'No devices were found'", "fail gpus         nvidia-smi does not work"),
    ],
)
def test_unusual_output_of_nvidia_smi_is_understood(
    says: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = doctor("--only", "gpus")
    assert expected in found.out, found.out


def test_torch_that_loads_too_slowly_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TORCH_TIMEOUT", 0.01)
    found = doctor("--only", "torch")
    assert found.code == 78 and "torch did not load within 0.01 s" in found.out
    assert json.loads(doctor("--only", "torch", "--json").out)[0]["code"] == 78


def test_ctrl_c_prints_an_error_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: PlannedJob) -> CheckResult:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusion.jobs.doctor.CHECKS", (Check("store", "", interrupted),))
    found = doctor("--only", "store")
    assert (found.code, found.err) == (130, "error: interrupted\nhint: run the same command again\n")


def test_a_cache_folder_that_cannot_be_examined_is_not_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", f"/tmp/{'x' * 300}")  # as HOME=/root is to another user
    found = doctor("--only", "folders")
    assert found.code != 70 and "broke" not in found.out, found.out


def test_a_file_given_as_data_is_refused_with_its_folder_as_hint(data: Path) -> None:
    found = doctor("--only", "data", "--data", str(data / "train.csv"))
    assert found.code == 65 and f"hint: give its folder: --data {data}\n" in found.out


def test_hidden_files_are_ignored_and_a_source_that_exists_twice_is_refused(data: Path) -> None:
    train = data / "embeddings" / "train"
    for name in ("_SUCCESS", "._cnn.parquet", ".hidden.parquet", "notes.txt"):
        (train / name).touch()
    for split in ("train", "test"):
        (data / "embeddings" / split / "spark.parquet").mkdir()
        (data / "embeddings" / split / "spark.parquet" / "part-0.parquet").touch()
    assert "for both cnn, qwen_text, spark\n" in doctor("--only", "data", "--data", str(data)).out
    flags = ["--variant", "qwen_clip", "--sources.clip-image", "spark"]
    assert doctor("--only", "data", "--data", str(data), *flags).code == 0
    (train / "spark").mkdir()
    (train / "spark" / "x.parquet").touch()
    twice = doctor("--only", "data", "--data", str(data), *flags)
    assert twice.code == 65 and "remove the wrong one" in twice.out
