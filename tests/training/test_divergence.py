"""A NaN in the loss or the state ends an attempt, but never gets into a checkpoint, so the run can be resumed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from fusion import storage
from fusion.all_embeddings import train
from fusion.data.tables import Table
from fusion.nn.batch import Batch
from fusion.records import checkpoint, manifests
from fusion.records.run import RunFolder
from fusion.records.schemas import CheckpointManifest
from fusion.training import trainer
from fusion.training.dataset import warn_of_extreme_prices
from fusion.training.trainer import Fit
from tests.conftest import SMALL

BROKEN_FROM = 33  # the step from which on the state is broken; an epoch has 60 steps


def flags(catalog: Path, output: Path) -> list[str]:
    where = ["--data", str(catalog), "--output", str(output), "--run-id", "r"]
    return [*where, *SMALL, "--batch-size", "8", "--epochs", "1", "--checkpoint-steps", "5", "--keep", "2"]


def broken(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Simulates failing hardware: from a step on, the loss, a weight or a moment of the optimizer is NaN."""
    original = Fit._train_batch

    def train_batch(self: Fit, batch: Tensor, inputs: Batch) -> Tensor:
        loss = original(self, batch, inputs)
        if self.step < BROKEN_FROM:
            return loss
        if what == "loss":
            return loss * float("nan")
        weight = next(self.model.parameters())
        broken = weight if what == "weight" else self.optimizer.state[weight]["exp_avg"]
        with torch.no_grad():
            broken[0] = float("nan")
        return loss

    monkeypatch.setattr(Fit, "_train_batch", train_batch)


@pytest.mark.parametrize("what", ["loss", "weight", "moment"])
def test_a_state_that_is_not_finite_is_never_committed(
    what: str, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "runs/r")
    with monkeypatch.context() as patch:
        broken(patch, what)
        assert train.main(flags(catalog, tmp_path)) == 70
    said = capsys.readouterr().err
    assert "not finite at step 35, in epoch 1" in said
    assert "event=committed" in said and "smape=inf" not in said  # the SMAPE is not known before the first validation
    assert [made.manifest.step for made in RunFolder(run).checkpoints()] == [25, 30]
    assert train.main(flags(catalog, tmp_path)) == 0  # on a healthy machine
    said = capsys.readouterr().err
    assert "event=resumed" in said
    (finished,) = [line for line in said.splitlines() if "event=finished" in line]
    assert "best_epoch=1/1" in finished and "median_price_smape=" in finished
    assert RunFolder(run).checkpoints()[-1].manifest.finished


def test_a_state_that_is_not_finite_is_never_resumed_from(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions committed such states."""
    run = str(tmp_path / "runs/r")
    with monkeypatch.context() as patch:
        broken(patch, "weight")
        patch.setattr(trainer, "not_finite", lambda *_: None)
        patch.setattr(Fit, "share_loss", lambda self, *flags: self.world.sum(flags))
        assert train.main([*flags(catalog, tmp_path), "--keep", "9"]) == 70
    assert RunFolder(run).checkpoints()[-1].manifest.step > BROKEN_FROM
    capsys.readouterr()
    assert train.main(flags(catalog, tmp_path)) == 0
    said = capsys.readouterr().err
    assert "event=checkpoint_not_finite" in said and "step-00000030 epoch=1 step=30" in said


def test_the_newest_validated_checkpoint_is_kept(tmp_path: Path) -> None:
    """The two newest checkpoints come after it, and may be those of a training that has diverged."""
    for step, epoch, smape in ((10, 1, 40.0), (20, 2, 50.0), (30, 2, 50.0), (40, 3, 60.0), (50, 3, 60.0)):
        manifest = CheckpointManifest(1, [], step, epoch, smape, False, "0" * 64, "0" * 64, "")
        storage.write(str(tmp_path / f"checkpoints/step-{step:08d}/MANIFEST.json"), storage.as_json(asdict(manifest)))
    checkpoint.prune(RunFolder(str(tmp_path)), keep=1, resumed_from=None)
    assert [made.manifest.step for made in RunFolder(str(tmp_path)).checkpoints()] == [10, 30, 50]


def test_a_state_of_another_version_is_refused(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        broken(patch, "loss")
        assert train.main(flags(catalog, tmp_path)) == 70
    newest = checkpoint.newest

    def older(run: RunFolder) -> tuple[manifests.Checkpoint, dict[str, Tensor], dict[str, Any]] | None:
        found = newest(run)
        assert found is not None
        found[2]["weights"].pop("target_median")
        return found

    monkeypatch.setattr(checkpoint, "newest", older)
    assert train.main(flags(catalog, tmp_path)) == 65
    assert "was made by another version of this training" in capsys.readouterr().err


@pytest.mark.parametrize(("price", "is_named"), [(1e308, True), (1e-9, True), (20_000.0, False)])
def test_extreme_prices_are_named(price: float, is_named: bool, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame({"price": [10.0, 20.0, 30.0, price]}, index=["a", "b", "c", "d"])
    warn_of_extreme_prices(Table(frame, np.arange(4)))
    said = capsys.readouterr().err
    assert (f'event=extreme_prices rows=1 first="d ({price:g})"' in said) == is_named
