"""Early stopping: when no epoch has been better for a while."""

from __future__ import annotations

import math

from fusion.errors import DivergedError


class EarlyStopping:
    """Called with the score of each epoch; true when `patience` epochs in a row were not better by `min_delta`.

    >>> stop = EarlyStopping(patience=2)
    >>> [stop(score) for score in (3.0, 2.0, 2.5, 2.0)]
    [False, False, False, True]
    """

    def __init__(self, patience: int = 7, min_delta: float = 0, mode: str = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode is {mode!r}, expected 'min' or 'max'")
        self.patience, self.min_delta, self.mode = patience, min_delta, mode
        self.best: float | None = None
        self.n_worse = 0

    def __call__(self, score: float) -> bool:
        if not math.isfinite(score):
            raise DivergedError(f"the score is {score}", "look for the first epoch whose loss is not finite")
        gain = 0.0 if self.best is None else (self.best - score if self.mode == "min" else score - self.best)
        if self.best is None or gain > self.min_delta:
            self.best, self.n_worse = score, 0
        else:
            self.n_worse += 1
        return self.n_worse >= self.patience

    @property
    def stopped(self) -> bool:
        return self.n_worse >= self.patience
