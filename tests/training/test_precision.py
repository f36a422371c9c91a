"""`--precision auto` measures which arithmetic is faster, says so, and a resumed run keeps the choice."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.all_embeddings import train
from fusion.training.precision import Precision, faster_precision
from fusion.training.trainer import Fit
from tests.conftest import SMALL


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(2.0, 1.0, "bf16"), (1.0, 0.95, "fp32"), (1.0, 3.0, "fp32")])
def test_bf16_is_chosen_if_it_is_clearly_faster(
    fp32: float, bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def trial(precision: Precision) -> Callable[[], None]:
        calls = []

        def compute() -> None:
            calls.append(precision)
            warming_up = 9.0 if len(calls) <= 2 and precision == "bf16" else 0.0
            now[0] += (bf16 if precision == "bf16" else fp32) + warming_up

        return compute

    monkeypatch.setattr("fusion.training.precision.time.perf_counter", lambda: now[0])
    assert faster_precision(trial, 2, torch.device("cpu")) == chosen


def test_a_run_states_its_choice_and_keeps_it(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Fit.end_epoch

    def failing_in_the_second_epoch(fit: Fit, *arguments: Any) -> dict[str, Any]:
        if fit.epoch == 1:
            raise OSError("the power is gone")
        return end(fit, *arguments)

    where = ["--data", str(catalog), "--output", str(tmp_path), "--run-id", "r", *SMALL, "--precision", "auto"]
    where += ["--epochs", "2", "--checkpoint-seconds", "0"]
    with monkeypatch.context() as patched:
        patched.setattr(Fit, "end_epoch", failing_in_the_second_epoch)
        assert train.main(where) != 0
    (chosen,) = re.findall(r"event=precision chosen=(\w+) fp32_ms=[\d.]+ bf16_ms=[\d.]+", capsys.readouterr().err)
    assert _states(tmp_path)[-1]["precision"] == chosen
    assert train.main(where) == 0
    assert "event=precision" not in capsys.readouterr().err  # this attempt resumed the first and measured nothing
    assert [state["precision"] for state in _states(tmp_path)] == [chosen] * len(_states(tmp_path))


def _states(output: Path) -> list[dict[str, Any]]:
    return [torch.load(file, weights_only=True) for file in sorted(output.glob("runs/r/checkpoints/*/state.pt"))]
