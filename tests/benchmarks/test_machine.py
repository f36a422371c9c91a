"""Two files of measurements are compared by Welch's t-test, setting by setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import machine


def test_compares_the_settings_that_both_files_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    machine.write(
        before, {"slow": {"seconds": [2.0, 2.02, 1.99]}, "same": {"seconds": [1.0, 1.3]}, "gone": {"seconds": [1.0]}}
    )
    machine.write(after, {"slow": {"seconds": [1.0, 1.01, 0.99]}, "same": {"seconds": [1.1, 1.2]}})
    machine.compare([before, after])
    slow, same = capsys.readouterr().out.splitlines()
    assert slow.startswith("slow") and "0.499 times the seconds" in slow and slow.endswith(": changed")
    assert same.startswith("same") and same.endswith(": no change that could be told from chance")


def test_a_single_measurement_has_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "once.json")
    machine.write(file, {"one": {"cpu_seconds": [2.0]}, "never": {"cpu_seconds": []}})
    machine.compare([file, file], "cpu_seconds")
    assert capsys.readouterr().out.split(maxsplit=1)[1] == "1.000 times the cpu seconds, measured once: no verdict\n"
