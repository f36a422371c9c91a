"""When early stopping stops, and what it refuses."""

from __future__ import annotations

import pytest

from fusion.errors import DivergedError
from fusion.utils import (
    EarlyStopping,
)


@pytest.mark.parametrize(("mode", "scores"), [("min", [5, 4, 4.5, 4.2, 3, 3, 3]), ("max", [1, 2, 1.5, 1.8, 3, 3, 3])])
def test_early_stopping_stops_after_patience(mode: str, scores: list[float]) -> None:
    stop = EarlyStopping(patience=2, mode=mode)
    assert [stop(score) for score in scores] == [False, False, False, True, False, False, True]


def test_early_stopping_requires_more_than_min_delta() -> None:
    stop = EarlyStopping(patience=1, min_delta=0.5)
    assert [stop(score) for score in (3.0, 2.4, 2.0)] == [False, False, True]


def test_early_stopping_refuses_nan_and_unknown_modes() -> None:
    with pytest.raises(DivergedError, match="the score is nan"):
        EarlyStopping()(float("nan"))
    with pytest.raises(ValueError, match="expected 'min' or 'max'"):
        EarlyStopping(mode="lowest")
