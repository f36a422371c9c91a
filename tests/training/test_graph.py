"""Steps that a GPU records and replays. There is no GPU here, so these tests run the recorded step on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusion.all_embeddings import train
from fusion.nn.draws import CountedWords, words_from
from fusion.training.graph import Step
from fusion.training.steps import Steps
from tests.conftest import SMALL


class StepOnCPU:
    """Stands in for `StepGraph`: takes each step as it would be recorded, without recording it."""

    n_steps = 0

    def __init__(self, step: Step, n_rows: int, device: torch.device) -> None:
        self.step, self.n_rows = step, n_rows

    def run(self, rows: Tensor, seed: int) -> Tensor:
        StepOnCPU.n_steps += 1
        with words_from(CountedWords(seed, slice(0, self.n_rows), self.n_rows)):
            return self.step(rows)


@pytest.mark.parametrize("more", [[], ["--folds", "2"], ["--recipe", "published"]], ids=["one", "members", "published"])
def test_the_recorded_step_computes_the_same(
    catalog: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str) -> bytes:
        where = ["--data", str(catalog), "--output", str(tmp_path / name), "--run-id", "r"]
        assert train.main([*where, *SMALL, "--epochs", "2", *more]) == 0
        (model,) = sorted((tmp_path / name).glob("**/model.safetensors"))[-1:]
        return model.read_bytes()

    plain = trained("plain")
    monkeypatch.setattr("fusion.training.steps.StepGraph", StepOnCPU)
    monkeypatch.setattr(Steps, "_can_be_recorded", lambda _: True)
    monkeypatch.setattr(StepOnCPU, "n_steps", 0)
    assert trained("recorded") == plain
    assert StepOnCPU.n_steps > 0


def test_rates_stay_where_the_recorded_step_reads_them(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the learning rate is a tensor that is filled before each step; a checkpoint of either kind resumes."""
    where = ["--data", str(catalog), "--output", str(tmp_path), "--run-id", "r", *SMALL, "--epochs", "2"]
    rates, kinds, update = [], set(), Steps._update

    def recorded(steps: Steps) -> None:
        update(steps)
        rates.append(float(steps.optimizer.param_groups[0]["lr"]))
        kinds.add(steps.optimizer.param_groups[0]["lr"].data_ptr())

    def in_tensors(steps: Steps) -> None:
        for group in steps.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]))

    monkeypatch.setattr(Steps, "place_rates", in_tensors)
    monkeypatch.setattr(Steps, "_update", recorded)
    assert train.main(where) == 0
    assert len(kinds) == 1 and len(set(rates)) == len(rates) and rates[-1] == 0
