"""`Fit`: the state of a training (model, optimizer, schedule, position), its steps, and how it is saved and restored.

A resumed training continues exactly. The order of rows is a function of (seed, epoch), dropout is a function of (seed,
step, row), and the position is a number of global batches. So a snapshot contains no state of an iterator or random
generator, and a training can be resumed with any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fusion.config import RunConfig
from fusion.distributed.world import World
from fusion.errors import DivergedError
from fusion.metrics import compute_smape
from fusion.nn.batch import Batch
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import predict_rows, pricing
from fusion.prediction.resumable import CHUNK, Arrays, with_beats
from fusion.records.checkpoint import Snapshot, not_finite
from fusion.records.validation import validation_frame
from fusion.training.dataset import TrainingData
from fusion.training.early_stopping import EarlyStopping
from fusion.training.order import GlobalBatch, epoch_batches, n_batches
from fusion.training.seeds import derived_seed
from fusion.training.steps import Steps

# Steps between two synchronisations of the ranks, in which they add up their losses and may save or stop. A stop signal
# waits for at most so many steps; synchronising at every step would slow training down.
AGREE_STEPS = 10

# Validation rows per forward pass. Their neighbours are known, so many more fit in a GPU's memory than in a prediction.
VALIDATED_ROWS = {"cuda": 16 * CHUNK}

FLOP_ROWS = 8  # rows of the batch on which floating-point operations are counted

Beat = Callable[[], None]  # reports to the watchdog that this rank makes progress


class Fit:
    """Model, optimizer, scheduler, early stopping, history and position of one training, on one rank.

    Attributes:
        epoch: number of epochs that are completed and validated.
        batch: number of batches of the current epoch that are done.
        step: number of optimizer steps taken.
        loss_sum: loss summed over the rows of the current epoch's batches, over all ranks, as of the last `share_loss`.
        smape: SMAPE in percent of `best` on the validation rows; infinite before the first validation.
        history: one entry per completed epoch.
        best: state dict at the lowest validation SMAPE so far; with a cosine schedule, at the last validation.
        validated: the outputs of `best` on the validation rows, such as their price, as name to [n_validation, …]. Only
            rank 0 has them; empty on other ranks, and None before the first validation.
    """

    def __init__(self, config: RunConfig, model: PriceModel, data: TrainingData, world: World) -> None:
        self.config, self.model, self.data, self.world = config, model, data, world
        self.store = (data.inputs or data.store).resident_on(world.device, config.residency)
        self.steps = Steps(config, model, data, self.store, world)
        self.optimizer = self.steps.optimizer
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=config.lr_factor, patience=config.lr_patience, min_lr=config.min_lr
        )
        self.stopping = EarlyStopping(config.patience or config.epochs + 1)
        self.epoch = self.batch = self.step = 0
        self.loss_sum, self.smape = 0.0, float("inf")
        self.history: list[dict[str, Any]] = []
        self.best = _copy(model.state_dict())
        self.validated: Arrays | None = None
        self._unshared = torch.zeros((), device=world.device)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs or self.stopping.stopped

    @property
    def n_batches(self) -> int:
        return n_batches(self.config, len(self.data.train))

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def flop_per_row(self) -> float:
        """Returns the floating-point operations of the matrix products of a forward pass, per row, for all members."""
        rows = self.store.own(self.data.train)[:FLOP_ROWS]
        counter = FlopCounterMode(display=False)
        self.model.eval()
        with torch.inference_mode(), counter:
            self.model(self.store.batch(rows, self.world.device))
        return counter.get_total_flops() / len(rows)

    def run_epoch(self, beat: Beat) -> Iterator[None]:
        """Trains on the rest of the current epoch, and calls `beat` after every step.

        Yields after each step at which the ranks synchronise. These steps do not depend on the number of ranks.
        """
        self.model.train()
        batches = epoch_batches(self.config, self.data.train, self.epoch + 1, self.world, self.store.nodes)
        left = batches[self.batch :]
        every = min(AGREE_STEPS, self.config.checkpoint_steps or AGREE_STEPS)
        for batch, inputs in zip(left, self.steps.inputs(left), strict=True):
            self._unshared += self._train_batch(batch, inputs) * len(batch.rows)
            self.step += 1
            self.batch += 1
            beat()
            if self.batch < len(batches) and self.step % every == 0:
                yield

    def share_loss(self, *flags: float) -> list[float]:
        """Sums the loss and each flag over the ranks, adds the loss to `loss_sum`, and returns the sums of the flags.

        Raises:
            DivergedError: the loss is not finite; all ranks raise it.
        """
        total, *shared = self.world.sum([self._unshared.item(), *flags])
        self.loss_sum += total
        self._unshared.zero_()
        if not math.isfinite(self.loss_sum):
            raise self._diverged(f"the loss is {self.loss_sum}, which is not finite")
        return shared

    def end_epoch(self, seconds: float, beat: Beat) -> dict[str, Any]:
        """Validates, steps the schedules, and moves on to the next epoch; returns the figures to log.

        Args:
            seconds: time that the epoch's training took, for its entry in the history.
            beat: called for every chunk of validation rows.

        Raises:
            DivergedError: the SMAPE is not finite.
        """
        loss, (smape, validated) = self.loss_sum / len(self.data.train), self._validate(beat)
        if not math.isfinite(smape):
            raise self._diverged(f"the validation SMAPE is {smape}, which is not finite")
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, 0.0
        facts = {"epoch": self.epoch, "step": self.step, "loss": loss, "smape": smape, "lr": self.lr}
        self.history.append(facts | {"seconds": seconds})
        # A cosine schedule ends with a learning rate of 0, so it keeps the last weights. As validation rows then choose
        # nothing, their SMAPE is not biased.
        if smape < self.smape or self.config.schedule == "cosine":
            self.smape, self.best, self.validated = smape, _copy(self.model.state_dict()), validated
        if self.config.schedule == "plateau":
            self.scheduler.step(smape)
        self.stopping(smape)
        return facts | {"step": f"{self.step}/{self.config.epochs * self.n_batches}"}

    def snapshot(self) -> Snapshot:
        """Returns a copy, in CPU memory, of everything that resuming needs.

        Raises:
            DivergedError: a weight or a state of the optimizer is not finite. It is not worth saving.
        """
        moving = {"weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best}
        wrong = not_finite(moving)
        if wrong is not None:
            raise self._diverged(f"{wrong} is not finite")
        smape = self.smape if math.isfinite(self.smape) else None
        state = {
            "precision": self.steps.precision,
            "weights": _copy(self.model.state_dict()),
            "optimizer": _copy(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "stopping": {"best": self.stopping.best, "n_worse": self.stopping.n_worse},
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step, "loss_sum": self.loss_sum},
            "smape": self.smape,
            "history": [dict(entry) for entry in self.history],
        }
        facts = {"epoch": self.epoch, "smape": smape, "finished": self.finished}
        by = "" if self.data.category is None else str(self.data.category.name)
        return Snapshot(self.step, self.best, state, facts, self._validated(), by)

    def _validated(self) -> pd.DataFrame | None:
        if self.validated is None:
            return None
        return validation_frame(self.data.ids, self.data.prices, self.validated, self.data.category)

    def restore(self, best: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Sets this training to the state of a snapshot.

        Args:
            best: the snapshot's `weights`.
            state: the snapshot's `state`.

        Raises:
            RuntimeError, KeyError, ValueError: the state is that of another model or version.
        """
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps.place_rates()  # those of the state are where it was saved
        self.scheduler.load_state_dict(state["scheduler"])
        self.stopping.best, self.stopping.n_worse = state["stopping"]["best"], state["stopping"]["n_worse"]
        for name, value in state["position"].items():
            setattr(self, name, value)
        self.smape, self.history, self.best = state["smape"], state["history"], best
        self.validated = state.get("validated")
        self.steps.precision = state.get("precision", self.steps.precision)  # earlier versions did not write it

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what} at step {self.step}, in epoch {self.epoch + 1}",
            "run the same command again to resume from the last checkpoint, in case a GPU or its memory failed; "
            "if it fails in the same way, lower --lr or use --precision fp32 under another --run-id",
        )

    def _train_batch(self, batch: GlobalBatch, inputs: Batch | None) -> Tensor:
        """Takes one optimizer step, and returns this rank's part of the loss. See `Steps.take`."""
        if self.config.schedule == "cosine":
            self.steps.set_rates(self._cosine((self.step + 1) / (self.config.epochs * self.n_batches)))
        return self.steps.take(batch, inputs, derived_seed(self.config.seed, "step", self.step))

    def _cosine(self, done: float) -> float:
        """Returns the factor of the learning rate after a share `done` of all steps.

        It rises linearly during the warm-up, then falls to 0 along half a cosine.
        """
        warmup = self.config.warmup
        if done < warmup:
            return done / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))

    def _validate(self, beat: Beat) -> tuple[float, Arrays]:
        """Returns the SMAPE of the validation rows, on every rank, and the outputs for them, on rank 0."""
        compute = with_beats(pricing(self.model), beat)
        chunk = VALIDATED_ROWS.get(self.world.device.type)
        computed = predict_rows(compute, self.store, self.data.validation, self.world, chunk)
        return self.world.on_main(lambda: compute_smape(self.data.prices, computed["price"])), computed


def _copy(value: Any) -> Any:
    """Copies tensors, also inside dicts and lists, to the CPU; returns any other value unchanged."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
