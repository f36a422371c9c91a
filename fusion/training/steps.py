"""`Steps`: the optimizer steps of a training, each on this rank's part of a global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fusion.config import RunConfig
from fusion.data.row_store import RowStore
from fusion.distributed.world import World
from fusion.loss_functions import get_loss_function
from fusion.nn.batch import Batch
from fusion.nn.draws import random_rows
from fusion.nn.price_model import PriceModel, Targets
from fusion.training.dataset import TrainingData
from fusion.training.graph import WARM_UP, StepGraph
from fusion.training.order import GlobalBatch, batches_read_together
from fusion.training.precision import Precision, faster_precision

# The weights of similarities learn at this multiple of --lr. There is one per band, and training has to change each by
# whole units, while it changes the weights of networks by hundredths; AdamW moves every parameter by about its learning
# rate per step.
SIMILARITY_LR = 20.0


class Steps:
    """The model's replica on this rank, its loss and its optimizer.

    On one GPU that holds all rows, steps are recorded as a CUDA graph and replayed (see `StepGraph`).

    Args:
        store: the rows, where batches are gathered from.

    Attributes:
        precision: arithmetic of the steps; "auto" until `choose_precision`.
    """

    def __init__(self, config: RunConfig, model: PriceModel, data: TrainingData, store: RowStore, world: World) -> None:
        self.config, self.model, self.data, self.store, self.world = config, model, data, store, world
        self.targets, self.folds = data.targets.to(world.device), data.folds.to(world.device)
        self.held_out = torch.tensor(config.held_out(), device=world.device)  # [M] for each member
        # A single rank exchanges no gradients, so it is spared the copies that DistributedDataParallel makes of them.
        self.replica = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
        self.loss = get_loss_function(config.loss).to(world.device)
        self.loss.measure_in(float(model.get_buffer("price_unit")))
        self.precision = config.precision
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(model, config), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.place_rates()
        self._graph = StepGraph(self._take_all, config.batch_size, world.device) if self._can_be_recorded() else None

    def inputs(self, batches: Sequence[GlobalBatch]) -> Iterator[Batch | None]:
        """Yields this rank's part of each global batch, or None for those that the recorded step reads itself."""
        if self._graph:
            yield from (None for _ in batches)
        else:
            together = batches_read_together(self.config.shuffle, self.config.batch_size)
            yield from self.store.batches((batch.rows[batch.part] for batch in batches), self.world.device, together)

    def take(self, batch: GlobalBatch, inputs: Batch | None, seed: int) -> Tensor:
        """Takes one optimizer step on a global batch of B rows.

        Args:
            inputs: the rows of this rank's part of the batch; None: they are read here.
            seed: of the random numbers of this step.

        Returns:
            This rank's part of the loss. The parts of all ranks add up to the mean over the batch.
        """
        if self._graph and len(batch.rows) == self.config.batch_size:
            return self._graph.run(batch.rows, seed)
        with random_rows(seed, batch.part, len(batch.rows), self.world.device):
            return self._take(batch.to(self.world.device), inputs)

    def _take_all(self, rows: Tensor) -> Tensor:
        """Takes one optimizer step on all rows of a batch of B positions, on the device. See `StepGraph`."""
        return self._take(GlobalBatch.of(rows, slice(0, len(rows))), None)

    def _can_be_recorded(self) -> bool:
        """Whether a step reads and writes nothing outside the memory of one GPU."""
        candidates = self.store.candidates
        return self.world.size == 1 and self.store.is_on_gpu and (candidates is None or candidates.rows.is_cuda)

    def _take(self, batch: GlobalBatch, inputs: Batch | None) -> Tensor:
        """Computes gradients and updates the weights. Nothing in it waits for the GPU. See `take`.

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
        self._update()
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

    def _update(self) -> None:
        """Clips the gradient of each member on its own, and updates the weights."""
        self.model.members.clip_gradients(self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def set_rates(self, factor: float) -> None:
        """Sets the learning rates to the initial ones times this factor."""
        for group in self.optimizer.param_groups:
            rate = group["first_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def place_rates(self) -> None:
        """Puts the learning rates where steps read them: for a GPU into its memory, so that a step can be recorded."""
        on_gpu = self.world.device.type == "cuda"
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=self.world.device) if on_gpu else rate
            group["capturable"] = on_gpu


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
