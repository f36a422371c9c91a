from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fusion.training.pace import Pace, progress_text, seconds_left


def fit(**position: Any) -> Any:
    """A stand-in for `Fit`: a training of 10 epochs on 100 rows, with 10 rows per batch."""
    config = SimpleNamespace(epochs=10, batch_size=10)
    data = SimpleNamespace(train=range(100))
    fresh = {"epoch": 0, "batch": 0, "step": 0, "loss_sum": 0.0, "smape": float("inf"), "history": []}
    return SimpleNamespace(config=config, data=data, n_batches=10, **(fresh | position))


def test_nothing_is_known_before_the_first_step() -> None:
    assert seconds_left(fit(), Pace()) is None
    assert progress_text(fit(), Pace()) == "epoch 1/10 0/100"


def test_the_estimate_of_a_resumed_training_uses_only_its_own_steps() -> None:
    pace = Pace()
    pace.trained(steps=1, seconds=2.0)  # the last step of epoch 5
    pace.validated(seconds=5.0)
    assert seconds_left(fit(epoch=5, step=50), pace) == pytest.approx(50 * 2.0 + 5 * 5.0)


def test_the_text_shows_the_progress() -> None:
    pace = Pace()
    pace.trained(steps=5, seconds=1.0)
    history = [{"loss": 0.5, "smape": 40.0}, {"loss": 0.4567, "smape": 41.0}]
    between = fit(epoch=2, step=20, smape=40.0, history=history)
    assert progress_text(between, pace) == "epoch 3/10 20/100 loss 0.457 smape 41.00 best 40.00 0:00:16 left"
    within = fit(epoch=2, batch=5, step=25, loss_sum=10.0, smape=40.0, history=history)
    assert progress_text(within, pace) == "epoch 3/10 25/100 loss 0.2 smape 41.00 best 40.00 0:00:15 left"


def test_a_finished_training_is_in_its_last_epoch() -> None:
    pace = Pace()
    pace.trained(steps=100, seconds=1.0)
    assert progress_text(fit(epoch=10, step=100), pace) == "epoch 10/10 100/100 0:00:00 left"
