"""A machine without a writable temporary folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

from fusion.data import shared_memory
from fusion.errors import ConfigError
from fusion.jobs import doctor
from fusion.launch import launcher
from fusion.storage import scratch


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nothing"])


def test_a_missing_temporary_folder_is_a_config_error(nowhere: None) -> None:
    with pytest.raises(ConfigError, match=r"no temporary folder is writable: .*/proc/nothing") as caught:
        scratch.temporary_folder()
    assert "TMPDIR" in caught.value.remedy


def test_shared_memory_needs_no_temporary_folder(nowhere: None) -> None:
    with shared_memory._reserved(1, shared_memory._shared_folders(), "") as file:
        assert file.fileno() > 0


def test_the_launcher_reports_it(nowhere: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--nproc-per-node", "1", "fusion.verify"]) == 78
    assert "TMPDIR" in capsys.readouterr().err


def test_doctor_reports_it(nowhere: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--only", "folders"]) == 78
    said = capsys.readouterr()
    assert "no temporary folder is writable" in said.out and "TMPDIR" in said.out


def test_importing_looks_for_no_temporary_folder() -> None:
    code = "import tempfile, fusion.data.shared_memory, fusion.launch, fusion.jobs.doctor; print(tempfile.tempdir)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
