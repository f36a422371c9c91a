"""`save_checkpoint` and `load_checkpoint`: models with their optimizers, at any URL."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fusion.errors import DataError
from fusion.utils import (
    load_checkpoint,
    save_checkpoint,
)


def parts() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_checkpoint_can_be_saved_and_loaded(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = f"{tmp_path if place == 'local' else request.getfixturevalue('bucket')}/deep/model.pt"
    model, optimizer, scheduler = parts()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    save_checkpoint(model, optimizer, scheduler, 4, {"smape": 12.5}, path)
    other = parts()
    assert load_checkpoint(path, *other) == (4, {"smape": 12.5})
    assert torch.equal(other[0].state_dict()["weight"], model.state_dict()["weight"])
    assert other[1].state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    assert other[2].state_dict() == scheduler.state_dict()
    alone = nn.Linear(3, 1)
    load_checkpoint(path, alone)
    assert torch.equal(alone.weight, model.weight)


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def test_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    torch.save({"model": Evil(f"touch {marker}")}, path)
    with pytest.raises(DataError, match=r"is no checkpoint: it holds [a-z]+.system, which could execute code"):
        load_checkpoint(str(path), nn.Linear(3, 1))
    assert not marker.exists()
    torch.load(path, weights_only=False)  # loaded with trust, the file executes its command
    assert marker.exists()


def test_an_unusable_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt")
    save_checkpoint(nn.Linear(3, 1), None, None, 1, {}, path)
    model, optimizer, _ = parts()
    with pytest.raises(DataError, match="was saved without optimizer"):
        load_checkpoint(path, model, optimizer)
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    with pytest.raises(DataError, match="is no checkpoint"):
        load_checkpoint(path, model)
    with pytest.raises(DataError, match="does not exist"):
        load_checkpoint(str(tmp_path / "nothing.pt"), model)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.mean([1.0, 2.0]), 1.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.array(2.5), 2.5),
        (torch.tensor(4.0), 4.0),
        (np.str_("a"), "a"),
        ({"by": [np.float64(1), (np.bool_(True), None)]}, {"by": [1.0, (True, None)]}),
        (np.arange(3), [0, 1, 2]),
    ],
    ids=repr,
)
def test_numpy_metrics_and_epochs_are_loaded_as_plain_numbers(value: object, plain: object, tmp_path: Path) -> None:
    path, model = str(tmp_path / "model.pt"), nn.Linear(3, 1)
    save_checkpoint(model, None, None, np.int64(3), {"x": value}, path)  # type: ignore[arg-type, dict-item]
    epoch, metrics = load_checkpoint(path, model)
    assert (epoch, metrics) == (3, {"x": plain})
    assert type(epoch) is int and type(metrics["x"]) is type(plain)


@pytest.mark.parametrize("part", ["metrics", "scheduler"])
def test_values_that_could_not_be_loaded_are_not_saved(part: str, tmp_path: Path) -> None:
    path, (model, optimizer, scheduler) = tmp_path / "model.pt", parts()
    scheduler.extra = Path("x")  # type: ignore[attr-defined]
    metrics = {"smape": Path("x")} if part == "metrics" else {}
    with pytest.raises(TypeError, match=f"{part} can hold tensors and plain values only: it holds pathlib.PosixPath"):
        save_checkpoint(model, optimizer, None if part == "metrics" else scheduler, 1, metrics, str(path))  # type: ignore[arg-type]
    assert not path.exists()


def test_a_scheduler_with_numbers_of_numpy_is_saved(tmp_path: Path) -> None:
    """As after `scheduler.step(np.mean(losses))`."""
    path, model = str(tmp_path / "model.pt"), nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(0.1))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    scheduler.step(np.mean([1.0, 2.0]))
    save_checkpoint(model, optimizer, scheduler, 1, {}, path)
    load_checkpoint(path, model, optimizer, scheduler)
    assert scheduler.best == 1.5
