"""Training: `train(config, build_network)` from embeddings to a committed model, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fusion import checkpoint, log, storage
from fusion.config import RunConfig
from fusion.distributed import World, world
from fusion.embeddings import RowStore, load
from fusion.errors import DivergedError
from fusion.layers import PriceModel, random_rows
from fusion.loss_functions import get_loss_function
from fusion.metrics import compute_smape
from fusion.prediction import BuildNetwork, C, predict_rows
from fusion.runs import attempt, describe_run, point_to_run, run_url, start_run
from fusion.splits import split_rows, to_parquet
from fusion.tables import read_table


def train(config: C, build_network: BuildNetwork[C]) -> None:
    """Trains a run and commits its best weights under `<output>/runs/<run id>`; a finished run is left as it is.

    Raises:
        DataError, ConfigError, CredentialsError, UnreachableError: see contracts of the modules called.
        DivergedError: the loss or the validation SMAPE is not finite.
    """
    with world(config.device) as place:
        log.configure(config.name(), place.rank, place.size)
        get_loss_function(config.loss)  # an unknown name is found out before anything is read
        if place.on_main(lambda: start_run(config)):
            log.info(event="finished_before", run=run_url(config), to_train_again="another --run-id or other settings")
            return
        if place.is_main:
            with attempt(run_url(config)):
                _train(config, build_network, place)
        else:
            _train(config, build_network, place)


def _train(config: C, build_network: BuildNetwork[C], place: World) -> None:
    data = read_data(config, place)
    set_seed(config.seed)
    model = PriceModel(build_network(config, data.store.dims), data.store.dims, config.modality_dropout)
    statistics = {role: _statistics(data, role) for role in data.store.dims}
    model.calibrate(statistics, data.targets[data.train])
    log.info(
        event="start",
        parameters=sum(p.numel() for p in model.parameters()),
        steps_an_epoch=-(-len(data.train) // config.batch_size),
        device=place.device,
        settings=json.dumps({"loss": config.loss, "batch_size": config.batch_size, "lr": config.lr}),
    )
    median = float(np.expm1(data.targets[data.train].median().item()))
    log.info(event="baseline", median_price=median, smape=compute_smape(data.prices, np.full_like(data.prices, median)))
    result = _fit(config, model.to(place.device), data, place)
    place.on_main(lambda: _commit(config, model, result))


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and to validate on.

    Attributes:
        targets: [N] log1p(price), float32.
        train, validation: positions in the store, int64. Rows without any embedding are not trained on.
        prices: [n_validation] dollars, float64.
    """

    store: RowStore
    targets: Tensor
    train: Tensor
    validation: Tensor
    prices: np.ndarray


def read_data(config: RunConfig, place: World) -> TrainingData:
    """Reads, splits and stores what the run is made of: `split.parquet` and `run.json`."""
    started = time.monotonic()
    table = place.on_main(lambda: read_table(config.data, "train", priced=True, drop_bad_prices=config.drop_bad_prices))
    store = load(config.data, "train", config.bindings(), table.ids, place, max_missing=config.max_missing)
    log.info(event="read", rows=len(table), seconds=time.monotonic() - started)

    def split() -> pd.DataFrame:
        sides = split_rows(table, {role: values.numpy() for role, values in store.values.items()}, config)
        storage.write(storage.join(run_url(config), "split.parquet"), to_parquet(sides))
        frame_digest = hashlib.sha256(pd.util.hash_pandas_object(table.frame).to_numpy().tobytes()).hexdigest()
        describe_run(config, storage.sha256(f"{frame_digest}{store.digest()}".encode()), store.dims, place.size)
        return sides

    validates = torch.tensor((place.on_main(split)["side"] == "validation").to_numpy())
    targets = torch.from_numpy(np.log1p(table.prices).astype(np.float32))
    train = torch.nonzero(~validates & store.any_present()).squeeze(1)
    validation = torch.nonzero(validates).squeeze(1)
    return TrainingData(store, targets, train, validation, table.prices[validates.numpy()])


def _statistics(data: TrainingData, role: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation [D] over the training rows that have the role."""
    rows = data.train[data.store.present[role][data.train]]
    total = torch.zeros(2, data.store.dims[role], dtype=torch.float64)
    pivot = data.store.values[role][rows[:1024]].double().mean(0) if len(rows) else total[0]  # against cancellation
    for chunk in torch.split(rows, 4096):
        centred = data.store.values[role][chunk].double() - pivot
        total += torch.stack([centred.sum(0), centred.square().sum(0)])
    mean, square = total / max(1, len(rows))
    return (pivot + mean).float(), (square - mean.square()).clamp_min(0).sqrt().float()


@dataclass
class Result:
    """The best weights so far, when they were reached, and the story of all epochs."""

    history: list[dict[str, Any]]
    weights: dict[str, Tensor]
    smape: float = float("inf")
    epoch: int = 0
    step: int = 0


def _fit(config: RunConfig, model: PriceModel, data: TrainingData, place: World) -> Result:
    fit = _Fit(config, model, data, place)
    result, stopping = Result([], {}), EarlyStopping(config.patience)
    for epoch in range(1, config.epochs + 1):
        started = time.monotonic()
        loss = fit.train_epoch(epoch)
        smape = fit.validate()
        seconds = time.monotonic() - started
        facts = {"epoch": epoch, "step": fit.step, "loss": loss, "smape": smape, "lr": fit.lr}
        result.history.append(facts | {"seconds": seconds})
        log.info(**facts, rows_s=len(data.train) / seconds, eta_s=seconds * (config.epochs - epoch))
        if not np.isfinite([loss, smape]).all():
            raise DivergedError(
                f"loss {loss} and validation SMAPE {smape} after epoch {epoch} are not both finite",
                "lower --lr, or use --precision fp32",
            )
        if smape < result.smape:
            result.weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            result.smape, result.epoch, result.step = smape, epoch, fit.step
        if stopping(smape):
            log.info(event="early_stop", epoch=epoch, best_epoch=result.epoch, smape=result.smape)
            break
    return result


class _Fit:
    """The moving parts of a training: model, optimizer, scheduler, position."""

    def __init__(self, config: RunConfig, model: PriceModel, data: TrainingData, place: World) -> None:
        self.config, self.model, self.data, self.place = config, model, data, place
        self.store, self.targets = data.store.resident_on(place.device), data.targets.to(place.device)
        self.replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.loss = get_loss_function(config.loss)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=config.lr_factor, patience=config.lr_patience, min_lr=config.min_lr
        )
        self.step = 0

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def train_epoch(self, epoch: int) -> float:
        """Mean loss over the training rows, each seen once over all ranks."""
        self.model.train()
        total = torch.zeros((), device=self.place.device)
        for batch in self.batches(epoch):
            total += self.train_batch(batch) * len(batch)
            self.step += 1
        return self.place.sum([total.item()])[0] / len(self.data.train)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Global batches of an epoch: the same for any number of ranks."""
        order = torch.Generator().manual_seed(mixed(self.config.seed, "order", epoch))
        shuffled = self.data.train[torch.randperm(len(self.data.train), generator=order)]
        yield from torch.split(shuffled, self.config.batch_size)

    def train_batch(self, batch: Tensor) -> Tensor:
        """This rank's part of the loss of a global batch [B]; over all ranks they add up to the mean over rows."""
        part = self.place.share(len(batch))
        weight = (part.stop - part.start) / len(batch)
        if not weight:  # fewer rows than ranks: this one computes a row that counts for nothing
            part = slice(0, 1)
        rows = batch[part]
        inputs, present = self.store.batch(rows, self.place.device)
        seed = mixed(self.config.seed, "step", self.step)
        device, bf16 = self.place.device, self.config.precision == "bf16"
        with random_rows(seed, part, len(batch), device), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            prediction = self.replica(inputs, present)
        loss: Tensor = self.loss(prediction, self.targets[rows.to(device)]) * weight
        torch.autograd.backward(
            loss * self.place.size
        )  # DistributedDataParallel takes the mean over ranks, the rows want the sum
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def validate(self) -> float:
        """SMAPE of the validation rows; the learning rate follows it."""
        predicted = predict_rows(self.model, self.store, self.data.validation, self.place)
        smape = compute_smape(self.data.prices, predicted)
        self.scheduler.step(smape)
        return smape


def _commit(config: RunConfig, model: PriceModel, result: Result) -> None:
    run = run_url(config)
    history = pd.DataFrame(result.history)
    lines = "".join(f"{json.dumps(row)}\n" for row in result.history)
    storage.write(storage.join(run, "metrics", "train.jsonl"), lines.encode())
    storage.write(storage.join(run, "metrics", "epochs.csv"), history.to_csv(index=False).encode())
    facts = {"epoch": result.epoch, "smape": result.smape}
    made = checkpoint.commit(run, result.step, result.weights, model.dims, {"history": result.history}, facts)
    point_to_run(config, made.name, result.smape)
    log.info(event="committed", checkpoint=made.url, epoch=result.epoch, smape=result.smape)


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
        if not np.isfinite(score):
            raise DivergedError(f"the score is {score}", "look for the first epoch whose loss is not finite")
        gain = 0.0 if self.best is None else (self.best - score if self.mode == "min" else score - self.best)
        if self.best is None or gain > self.min_delta:
            self.best, self.n_worse = score, 0
        else:
            self.n_worse += 1
        return self.n_worse >= self.patience


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mixed(*parts: object) -> int:
    """A seed of 32 bits that is another for any other parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")
