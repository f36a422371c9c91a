"""`Fit`: the state of a training (model, optimizer, schedule, position), its steps, and how it is saved and restored.

A resumed training continues exactly. The order of rows is a function of (seed, epoch), dropout is a function of (seed,
step, row), and the position is a number of global batches. So a snapshot contains no state of an iterator or random
generator, and a training can be resumed with any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from fusion.config import RunConfig
from fusion.distributed.world import World
from fusion.errors import DivergedError
from fusion.loss_functions import get_loss_function
from fusion.metrics import compute_smape
from fusion.nn.batch import Batch
from fusion.nn.draws import random_rows
from fusion.nn.price_model import PriceModel, Targets
from fusion.prediction.predict import predict_rows, pricing
from fusion.prediction.resumable import CHUNK, Arrays, with_beats
from fusion.records.checkpoint import Snapshot, not_finite
from fusion.records.validation import validation_frame
from fusion.training.dataset import TrainingData
from fusion.training.early_stopping import EarlyStopping
from fusion.training.graph import WARM_UP, StepGraph
from fusion.training.order import GlobalBatch, batches_read_together, epoch_batches, n_batches
from fusion.training.precision import Precision, faster_precision
from fusion.training.seeds import derived_seed

# Steps between two synchronisations of the ranks, in which they add up their losses and may save or stop. A stop signal
# waits for at most so many steps; synchronising at every step would slow training down.
AGREE_STEPS = 10

# The weights of similarities learn at this multiple of --lr. There is one per band, and training has to change each by
# whole units, while it changes the weights of networks by hundredths; AdamW moves every parameter by about its learning
# rate per step.
SIMILARITY_LR = 20.0

# Validation rows per forward pass. Their neighbours are known, so many more fit in a GPU's memory than in a prediction.
VALIDATED_ROWS = {"cpu": CHUNK, "cuda": 16 * CHUNK}

FLOP_ROWS = 8  # rows of the batch on which floating-point operations are counted

Beat = Callable[[], None]  # reports to the watchdog that this rank makes progress


class Fit:
    """Model, optimizer, scheduler, early stopping, history and position of one training, on one rank.

    Attributes:
        held_out: [M] for each member of the model, the part of the split that it does not train on.
        precision: arithmetic of the steps; "auto" until `choose_precision`.
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
        self.targets, self.folds = data.targets.to(world.device), data.folds.to(world.device)
        self.held_out = torch.tensor(config.held_out(), device=world.device)
        # A single rank exchanges no gradients, so it is spared the copies that DistributedDataParallel makes of them.
        self.replica = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
        self.loss = get_loss_function(config.loss).to(world.device)
        self.loss.measure_in(float(model.get_buffer("price_unit")))
        self.precision = config.precision
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
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
        self._own_rates()
        self._graph = StepGraph(self._whole_step, config.batch_size, world.device) if self._can_be_recorded() else None

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
        for batch, inputs in zip(left, self._inputs(left), strict=True):
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
            "precision": self.precision,
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
        self._own_rates()  # those of the state are where it was saved
        self.scheduler.load_state_dict(state["scheduler"])
        self.stopping.best, self.stopping.n_worse = state["stopping"]["best"], state["stopping"]["n_worse"]
        for name, value in state["position"].items():
            setattr(self, name, value)
        self.smape, self.history, self.best = state["smape"], state["history"], best
        self.validated = state.get("validated")
        self.precision = state.get("precision", self.precision)  # earlier versions did not write it

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what} at step {self.step}, in epoch {self.epoch + 1}",
            "run the same command again to resume from the last checkpoint, in case a GPU or its memory failed; "
            "if it fails in the same way, lower --lr or use --precision fp32 under another --run-id",
        )

    def _inputs(self, batches: Sequence[GlobalBatch]) -> Iterator[Batch | None]:
        """Yields this rank's part of each global batch, or None for those that the recorded step reads itself."""
        if self._graph:
            yield from (None for _ in batches)
        else:
            together = batches_read_together(self.config.shuffle, self.config.batch_size)
            yield from self.store.batches((batch.rows[batch.part] for batch in batches), self.world.device, together)

    def _train_batch(self, batch: GlobalBatch, inputs: Batch | None) -> Tensor:
        """Takes one optimizer step on a global batch of B rows.

        Args:
            inputs: the rows of this rank's part of the batch; None: they are read here.

        Returns:
            This rank's part of the loss. The parts of all ranks add up to the mean over the batch.
        """
        n_rows, seed = len(batch.rows), derived_seed(self.config.seed, "step", self.step)
        self._set_rates()
        if self._graph and n_rows == self.config.batch_size:
            return self._graph.run(batch.rows, seed)
        with random_rows(seed, batch.part, n_rows, self.world.device):
            return self._step_on(batch.to(self.world.device), inputs)

    def _whole_step(self, rows: Tensor) -> Tensor:
        """Takes one optimizer step on all rows of a batch of B positions, on the device. See `StepGraph`."""
        return self._step_on(GlobalBatch.of(rows, slice(0, len(rows))), None)

    def _can_be_recorded(self) -> bool:
        """Whether a step reads and writes nothing outside the memory of one GPU."""
        tables = [*self.store.values.values()] + ([self.store.candidates.rows] if self.store.candidates else [])
        return self.world.size == 1 and all(table.device.type == "cuda" for table in tables)

    def _step_on(self, batch: GlobalBatch, inputs: Batch | None) -> Tensor:
        """Computes gradients and updates the weights. Nothing in it waits for the GPU. See `_train_batch`.

        Args:
            batch: on the device.
        """
        inputs = inputs or self.store.batch(batch.rows[batch.part], self.world.device)
        counts = self.folds[batch.rows].unsqueeze(1) != self.held_out  # [B, M]: whether the member trains on the row
        weights = (counts / counts.sum().clamp(min=1))[batch.part]
        if batch.is_spare:
            weights = torch.zeros_like(weights)
        with self._autocast(self.precision):
            outputs = self.replica(inputs)
        loss, auxiliary = self._losses(outputs, batch.rows[batch.part], weights)
        # DistributedDataParallel averages gradients over the ranks, but the parts have to be summed: hence the number
        # of ranks. The loss is a mean over members: their number gives each the gradient that it would have alone.
        torch.autograd.backward((loss + auxiliary) * self.world.size * len(self.held_out))
        self._step()
        return loss.detach()

    def _autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=precision == "bf16")

    def choose_precision(self) -> None:
        """With `--precision auto`, measures which arithmetic is faster, unless the run has already chosen."""
        if self.precision == "auto":
            warm_up = WARM_UP + 1 if self._graph else 1
            choose = partial(faster_precision, self._trial, warm_up, self.world.device)
            self.precision = self.world.on_main(choose)

    def _trial(self, precision: Precision) -> Callable[[], object]:
        """Returns a function that computes the gradients of a batch, on this rank alone, and discards them."""
        rows, device = self.data.train[: self.config.batch_size], self.world.device
        weights = torch.ones(len(rows), len(self.held_out), device=device)
        self.model.train()

        def gradients(rows: Tensor) -> Tensor:
            with self._autocast(precision):
                outputs = self.model(self.store.batch(rows, device))
            loss, auxiliary = self._losses(outputs, rows, weights)
            torch.autograd.grad(loss + auxiliary, list(self.model.parameters()))
            return loss.detach()

        if self._graph:
            return partial(StepGraph(gradients, len(rows), device).run, rows, seed=0)

        def compute() -> None:
            with random_rows(0, slice(0, len(rows)), len(rows), device):
                gradients(rows.to(device))

        return compute

    def _losses(self, outputs: Targets, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss of the predictions, and that of the kernel regression alone.

        The latter has a loss of its own so that similarities are learned even where the network corrects.
        """
        loss = self._loss(outputs.price, rows, weights)
        if outputs.neighbours is None:
            return loss, torch.zeros_like(loss)
        return loss, self._loss(outputs.neighbours, rows, weights)

    def _loss(self, prediction: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Returns the sum of the losses of predictions [B, M], times their weights [B, M]."""
        targets = self.targets[rows].unsqueeze(1).expand_as(prediction)
        terms = self.loss.rows(prediction.flatten(), targets.flatten()).view_as(weights)
        # A row that does not count may have any prediction, even one that is not finite.
        return torch.where(weights > 0, terms * weights, 0.0).sum()

    def _step(self) -> None:
        """Clips the gradient of each member on its own, and updates the weights."""
        self.model.members.clip_gradients(self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _set_rates(self) -> None:
        """Sets the learning rates of the next step."""
        if self.config.schedule != "cosine":
            return
        factor = self._cosine((self.step + 1) / (self.config.epochs * self.n_batches))
        for group in self.optimizer.param_groups:
            _set_rate(group, group["first_lr"] * factor)

    def _own_rates(self) -> None:
        """Keeps the learning rates where the step reads them: on a GPU in its memory, so that it can be recorded."""
        on_gpu = self.world.device.type == "cuda"
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=self.world.device) if on_gpu else rate
            group["capturable"] = on_gpu

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
        chunk = VALIDATED_ROWS[self.world.device.type]
        computed = predict_rows(compute, self.store, self.data.validation, self.world, chunk)
        return self.world.on_main(lambda: compute_smape(self.data.prices, computed["price"])), computed


def _parameter_groups(model: PriceModel, config: RunConfig) -> list[dict[str, Any]]:
    """Returns the optimizer's groups: the networks, and the weights of the similarity bands.

    The latter learn faster (see `SIMILARITY_LR`) and do not decay, because 0 is their initial value rather than a
    simpler model.
    """
    bands = [weight for name, weight in model.named_parameters() if name.endswith(".neighbours.change")]
    of_bands = {id(weight) for weight in bands}
    others = [weight for weight in model.parameters() if id(weight) not in of_bands]
    groups: list[dict[str, Any]] = [{"params": others, "lr": config.lr, "first_lr": config.lr}]
    if bands:
        lr = config.lr * SIMILARITY_LR
        groups.append({"params": bands, "lr": lr, "first_lr": lr, "weight_decay": 0.0})
    return groups


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """Sets the learning rate of one of the optimizer's groups, which is a number or a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _copy(value: Any) -> Any:
    """Copies tensors, also inside dicts and lists, to the CPU; returns any other value unchanged."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
