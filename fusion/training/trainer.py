"""The moving parts of a training, and how they are saved and restored so that going on is exact.

Row order is a function of (seed, epoch), dropout of (seed, step, row), and the position is a count of global batches:
nothing of an iterator or a random generator needs to be remembered, and any number of ranks can go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fusion.config import RunConfig
from fusion.distributed.world import World
from fusion.errors import DivergedError
from fusion.loss_functions import get_loss_function
from fusion.metrics import compute_smape
from fusion.nn.layers import random_rows
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import predict_rows, pricing
from fusion.prediction.resumable import Arrays, with_beats
from fusion.records.checkpoint import Snapshot, not_finite
from fusion.records.validation import validation_frame
from fusion.training.dataset import TrainingData
from fusion.training.early_stopping import EarlyStopping
from fusion.training.seeds import mixed

AGREE_STEPS = 10  # steps between two moments at which the ranks add up their losses and may stop or save

SIMILARITY_LR = 20.0  # times the learning rate: that of the weights of similarities

Beat = Callable[[], None]  # tells the watchdog that this rank gets on


class Fit:
    """Model, optimizer, scheduler, early stopping, history and position of one training.

    Attributes:
        epoch: epochs completed and validated.
        batch: batches of the next epoch that are done.
        step: optimizer steps taken.
        loss_sum: loss summed over the rows of those batches, all ranks together.
        history: one entry an epoch.
        best: state dict at the lowest validation SMAPE so far; with a cosine schedule, at the last validation.
        validated: what `best` computes of the validation rows, name to [n_validation, …], such as their price; rank 0
            alone has them. None before the first validation.
    """

    def __init__(self, config: RunConfig, model: PriceModel, data: TrainingData, world: World) -> None:
        self.config, self.model, self.data, self.world = config, model, data, world
        self.store, self.targets = data.store.resident_on(world.device), data.targets.to(world.device)
        self.held_out = torch.tensor(config.held_out())
        self.replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.loss = get_loss_function(config.loss)
        self.loss.measure_in(float(model.get_buffer("price_unit")))
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

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs or self.stopping.stopped

    @property
    def n_batches(self) -> int:
        return math.ceil(len(self.data.train) / self.config.batch_size)

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def run_epoch(self, beat: Beat) -> Iterator[None]:
        """Trains on what is left of the epoch; calls `beat` after every step.

        Yields after the steps at which all ranks synchronise; these do not depend on the number of ranks.
        """
        self.model.train()
        batches = self._batches()
        every = min(AGREE_STEPS, self.config.checkpoint_steps or AGREE_STEPS)
        for batch in batches[self.batch :]:
            self._unshared += self._train_batch(batch) * len(batch)
            self.step += 1
            self.batch += 1
            beat()
            if self.batch < len(batches) and self.step % every == 0:
                yield

    def share_loss(self, *flags: float) -> list[float]:
        """Adds the ranks' losses up; each flag summed over the ranks.

        Raises:
            DivergedError: the loss is not finite; the same on every rank.
        """
        total, *shared = self.world.sum([self._unshared.item(), *flags])
        self.loss_sum += total
        self._unshared.zero_()
        if not math.isfinite(self.loss_sum):
            raise self._diverged(f"the loss is {self.loss_sum}, which is not finite")
        return shared

    def end_epoch(self, seconds: float, beat: Beat) -> dict[str, Any]:
        """Validates, calling `beat` for every chunk of rows, and moves on to the next epoch; what there is to say.

        Raises:
            DivergedError: the SMAPE is not finite.
        """
        loss, (smape, validated) = self.loss_sum / len(self.data.train), self._validate(beat)
        if not math.isfinite(smape):
            raise self._diverged(f"the validation SMAPE is {smape}, which is not finite")
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, 0.0
        facts = {"epoch": self.epoch, "step": self.step, "loss": loss, "smape": smape, "lr": self.lr}
        self.history.append(facts | {"seconds": seconds})
        if smape < self.smape or self.config.schedule == "cosine":  # the last weights: none are chosen by validation
            self.smape, self.best, self.validated = smape, _copy(self.model.state_dict()), validated
        if self.config.schedule == "plateau":
            self.scheduler.step(smape)
        self.stopping(smape)
        return facts | {"step": f"{self.step}/{self.config.epochs * self.n_batches}"}

    def snapshot(self) -> Snapshot:
        """Everything that going on needs, copied to this process's memory.

        Raises:
            DivergedError: some of it is not finite, and going on from it would lead nowhere.
        """
        moving = {"weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best}
        wrong = not_finite(moving)
        if wrong is not None:
            raise self._diverged(f"{wrong} is not finite")
        smape = self.smape if math.isfinite(self.smape) else None
        state = {
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
        """Takes up where the snapshot was made."""
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.stopping.best, self.stopping.n_worse = state["stopping"]["best"], state["stopping"]["n_worse"]
        for name, value in state["position"].items():
            setattr(self, name, value)
        self.smape, self.history, self.best = state["smape"], state["history"], best
        self.validated = state.get("validated")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what} at step {self.step}, in epoch {self.epoch + 1}",
            "run the same command again to go on from the last checkpoint, in case a GPU or its memory failed; "
            "if it ends the same way, lower --lr or use --precision fp32 under another --run-id",
        )

    def _batches(self) -> tuple[Tensor, ...]:
        """Global batches of the next epoch: the same for any number of ranks."""
        order = torch.Generator().manual_seed(mixed(self.config.seed, "order", self.epoch + 1))
        shuffled = self.data.train[torch.randperm(len(self.data.train), generator=order)]
        return torch.split(shuffled, self.config.batch_size)

    def _train_batch(self, batch: Tensor) -> Tensor:
        """This rank's part of the loss of a global batch [B]; over all ranks they add up to the mean over rows."""
        part = self.world.share(len(batch))
        counts = self.data.folds[batch].unsqueeze(1) != self.held_out  # [B, M]: the member trains on the row
        n_counted = max(1.0, float(counts.sum()))
        if part.start == part.stop:  # fewer rows than ranks: this one computes a row that counts for nothing
            part, counts = slice(0, 1), torch.zeros_like(counts)
        rows, mine = batch[part], counts[part].to(self.world.device)
        seed = mixed(self.config.seed, "step", self.step)
        device, bf16 = self.world.device, self.config.precision == "bf16"
        with random_rows(seed, part, len(batch), device), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = self.replica(self.store.batch(rows, device))
        share = float(mine.sum()) / n_counted
        loss = self._loss(found.price, rows, mine) * share
        others = 0.0 if found.neighbours is None else self._loss(found.neighbours, rows, mine) * share
        # The mean over ranks is taken, the rows want the sum; and each member learns as if it were alone.
        torch.autograd.backward((loss + others) * self.world.size * len(self.held_out))
        self._step()
        return loss.detach()

    def _loss(self, prediction: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        """Mean loss of predictions [B, M] over the pairs that count; 0 with a gradient of 0 if there are none."""
        if not bool(counts.any()):
            return (prediction * 0).sum()
        targets = self.targets[rows.to(self.world.device)].unsqueeze(1).expand_as(prediction)
        loss: Tensor = self.loss(prediction[counts], targets[counts])
        return loss

    def _step(self) -> None:
        for member in self.model.members:
            nn.utils.clip_grad_norm_(member.parameters(), self.config.clip)
        if self.config.schedule == "cosine":
            factor = self._cosine((self.step + 1) / (self.config.epochs * self.n_batches))
            for group in self.optimizer.param_groups:
                group["lr"] = group["first_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _cosine(self, done: float) -> float:
        """Factor of the learning rate when this share of all steps is done: linear warm-up, then half a cosine."""
        warmup = self.config.warmup
        if done < warmup:
            return done / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))

    def _validate(self, beat: Beat) -> tuple[float, Arrays]:
        compute = with_beats(pricing(self.model), beat)
        computed = predict_rows(compute, self.store, self.data.validation, self.world)
        return self.world.on_main(lambda: compute_smape(self.data.prices, computed["price"])), computed


def _parameter_groups(model: PriceModel, config: RunConfig) -> list[dict[str, Any]]:
    """What bands of similarities count, few numbers of which a price hangs, learns faster and does not decay."""
    similar = [weight for name, weight in model.named_parameters() if name.endswith(".neighbours.change")]
    chosen = {id(weight) for weight in similar}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    groups: list[dict[str, Any]] = [{"params": others, "lr": config.lr, "first_lr": config.lr}]
    if similar:
        lr = config.lr * SIMILARITY_LR
        groups.append({"params": similar, "lr": lr, "first_lr": lr, "weight_decay": 0.0})
    return groups


def _copy(value: Any) -> Any:
    """Tensors copied to the CPU, through dicts and lists; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
