"""The time to a quality: curves of one training, the seconds at which they reach a threshold, and the table."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import time_to_quality
from benchmarks.time_to_quality import Clock, of_fusion, of_peer, reached, settings, show

SOURCES = {"clip_image": "images", "qwen_text": "texts"}
CURVE = [(1.0, 2.0, 50.0), (2.0, 3.0, 40.0), (3.0, 4.0, 42.0), (4.0, 5.0, 38.0)]


def test_the_first_measurement_below_a_threshold_counts() -> None:
    assert reached(CURVE, 42.0) == (2.0, 3.0)
    assert reached(CURVE, 38.0) == (4.0, 5.0)
    assert reached(CURVE, 37.9) is None


def test_a_threshold_that_one_repetition_misses_is_never_reached(capsys: pytest.CaptureFixture[str]) -> None:
    curves = {"mlp": [CURVE, [(2.0, 6.0, 39.0)]]}
    assert settings(curves, [40.0, 38.0]) == {"mlp to 40": {"seconds": [2.0, 2.0], "cpu_seconds": [3.0, 6.0]}}
    show(curves, [40.0, 38.0], 600.0)
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["mlp", "2.0", "/", "4.5", "never"]
    show(curves, [38.0], 5.5)
    assert "not yet" in capsys.readouterr().out.splitlines()[-1]


def test_the_clock_stands_still_while_it_is_measured() -> None:
    clock = Clock()
    with clock.measuring() as found:
        time.sleep(0.2)
        found(50.0)
    with clock.measuring() as found:
        found(40.0)
    assert [smape for _, _, smape in clock.curve] == [50.0, 40.0]
    assert clock.curve[1][0] < 0.2


def test_fusion_and_a_peer_are_measured_on_the_same_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_to_quality, "VARIANT_FLAGS", ["--epochs", "2", "--width", "8", "--hidden", "8"])
    sources = {"clip_image": "images", "siglip_image": "images", "qwen_text": "texts", "siglip_text": "texts"}
    ours, theirs = of_fusion(str(data), sources), of_peer("mlp", str(data), SOURCES, 600.0)
    assert len(ours) == 2
    assert len(theirs) == 40
    for curve in (ours, theirs):
        assert [seconds for seconds, _, _ in curve] == sorted(seconds for seconds, _, _ in curve)
        assert all(0 < smape < 200 for _, _, smape in curve)
