"""Progress of a training and the time that remains, for the log and for the progress bar on a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from fusion.training.trainer import Fit


@dataclass
class Pace:
    """Time per step and per validation, measured in this process only.

    Steps of an earlier attempt are not counted, so the estimate of a resumed training is right from its first step on.
    Training and validation are measured separately, because an epoch that was resumed near its end has few steps but a
    complete validation.

    >>> pace = Pace()
    >>> pace.trained(steps=10, seconds=20.0)
    >>> pace.validated(seconds=5.0)
    >>> pace.left(steps=30, validations=3)
    75.0
    """

    steps: int = 0
    training_seconds: float = 0.0
    validations: int = 0
    validation_seconds: float = 0.0

    def trained(self, steps: int, seconds: float) -> None:
        self.steps += steps
        self.training_seconds += seconds

    def validated(self, seconds: float) -> None:
        self.validations += 1
        self.validation_seconds += seconds

    def left(self, steps: int, validations: int) -> float | None:
        """Returns the estimated seconds for this many steps and validations; None before the first step."""
        if not self.steps:
            return None
        training = steps * self.training_seconds / self.steps
        return training + validations * self.validation_seconds / max(1, self.validations)


def seconds_left(fit: Fit, pace: Pace) -> float | None:
    """Returns the estimated seconds until all --epochs are done; early stopping may end the training before that."""
    epochs = fit.config.epochs
    return pace.left(epochs * fit.n_batches - fit.step, epochs - fit.epoch)


def progress_text(fit: Fit, pace: Pace) -> str:
    """Returns the label of the progress bar, leaving out figures that are not known yet.

    Such as `epoch 3/60 250/6000 loss 0.412 smape 41.07 best 40.88 0:12:33 left`, where 250 of 6000 steps are done. It
    fits into 80 columns.
    """
    epochs = fit.config.epochs
    parts = [f"epoch {min(fit.epoch + 1, epochs)}/{epochs}", f"{fit.step}/{epochs * fit.n_batches}"]
    loss = _loss(fit)
    if loss is not None:
        parts.append(f"loss {loss:.3g}")
    if fit.history:
        smapes = [entry["smape"] for entry in fit.history]
        parts.append(f"smape {smapes[-1]:.2f} best {min(smapes):.2f}")
    left = seconds_left(fit, pace)
    if left is not None:
        parts.append(f"{clock(left)} left")
    return " ".join(parts)


def clock(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds.

    >>> clock(7384.6)
    '2:03:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _loss(fit: Fit) -> float | None:
    """Returns the mean loss of the current epoch, of the last epoch if no batch of the current one is done, or None."""
    if fit.batch:
        return fit.loss_sum / min(fit.batch * fit.config.batch_size, len(fit.data.train))
    return float(fit.history[-1]["loss"]) if fit.history else None
