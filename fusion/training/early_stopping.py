"""Early stopping: ends a training when the validation score has not improved for a number of epochs."""

from __future__ import annotations

import math

from fusion.errors import DivergedError


class EarlyStopping:
    """Returns True once `patience` epochs in a row have not improved the best score by more than `min_delta`.

    Call it with the score of each epoch. A score that is NaN or infinite raises DivergedError.

    Args:
        mode: "min" if lower scores are better, "max" if higher ones are.

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
        """Takes the score of an epoch, and returns whether to stop."""
        if not math.isfinite(score):
            raise DivergedError(f"the score is {score}", "look for the first epoch whose loss is not finite")
        if self.best is None or self._gain(score, self.best) > self.min_delta:
            self.best, self.n_worse = score, 0
        else:
            self.n_worse += 1
        return self.n_worse >= self.patience

    def _gain(self, score: float, best: float) -> float:
        return best - score if self.mode == "min" else score - best

    @property
    def stopped(self) -> bool:
        """Whether the last call returned True; also right after `best` and `n_worse` were restored."""
        return self.n_worse >= self.patience
