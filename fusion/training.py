"""Training: `train(config, build_network)` from embeddings to a committed model, on any number of ranks.

The same command again goes on where the newest committed checkpoint left off, and leaves a finished run as it is.
"""

from __future__ import annotations

import shlex
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusion import checkpoint, log, manifests, records, stopping, storage
from fusion.best_run import point_to_run
from fusion.config import RunConfig, digest
from fusion.distributed import World, world
from fusion.duplicates import compared_columns, near_duplicate_groups
from fusion.embeddings import RowStore, load
from fusion.ending import recorded_by
from fusion.errors import DataError, StopRequested
from fusion.fingerprints import MAX_AGREEMENT_ROWS, agreements, fingerprints
from fusion.fitting import Fit, TrainingData, set_seed
from fusion.manifests import MODEL, SPLIT
from fusion.metrics import compute_smape
from fusion.pace import Pace, seconds_left, standing
from fusion.prediction import BuildNetwork, C, held, on_main_alone, validation_digest
from fusion.price_model import PriceModel
from fusion.provenance import code_digest
from fusion.records import RunFacts
from fusion.runs import (
    Lease,
    attempt,
    describe_run,
    end_of,
    record_end,
    run_url,
    start_run,
)
from fusion.splits import read_split, split_rows, to_parquet
from fusion.tables import Table, read_table, warn_of_poor_prices
from fusion.watchdog import Watchdog, watched

# Times the median price. Catalogs from screws to machines stay within it; 99999999 and 1e308 do not.
EXTREME_PRICE = 1e6


def train(config: C, build_network: BuildNetwork[C]) -> None:
    """Trains a run, committing checkpoints under `<output>/runs/<run id>`; a finished run is left as it is.

    Raises:
        DataError, ConfigError, CredentialsError, UnreachableError: see the modules called.
        DivergedError: the loss or the validation SMAPE is not finite.
        StopRequested: a signal came; what was done is committed.
        SupersededError: a newer attempt at the run began.
    """
    with world(config.device, config.stall_timeout) as place:
        log.configure(config.name(), place.rank, place.size)
        smape = place.on_main(lambda: _smape_if_finished(config))
        if smape is not None:
            log.info(event="finished_before", folder=run_url(config), smape=smape, hint=_next_commands(config))
            return
        with attempt(run_url(config)) if place.is_main else nullcontext() as lease:
            record = None if lease is None else lambda error: record_end(lease, end_of(error))
            with recorded_by(record):
                _train(config, build_network, place, lease)


def _smape_if_finished(config: RunConfig) -> float | None:
    start_run(config)
    for made in reversed(manifests.committed(run_url(config))):
        if made.manifest.finished and manifests.is_whole(made, MODEL):  # a damaged one is made again
            point_to_run(config, made)  # a run may have been killed before it did
            return made.smape
    return None


def _next_commands(config: RunConfig) -> str:
    """What to type next, as it can be pasted into a shell."""
    where = shlex.join(["--output", config.output, "--run-id", config.name()])
    commands = (
        f"`python -m fusion.{config.variant}.{name} {where}`" for name in ("evaluate_by_groups", "predict_test")
    )
    return " or ".join(commands)


def _train(config: C, build_network: BuildNetwork[C], place: World, lease: Lease | None) -> None:
    data = read_data(config, place)
    set_seed(config.seed)
    model = PriceModel(build_network(config, data.store.dims), data.store.dims, config.modality_dropout)
    model.calibrate({role: _statistics(data, role) for role in data.store.dims}, data.targets[data.train])
    fit = Fit(config, model.to(place.device), data, place)
    _log_start(fit)
    saver = Saver(config, fit, lease)
    saver.resume()
    # From here on: reading has time limits of its own.
    with watched(config.stall_timeout, lambda: f"rank {place.rank} at step {fit.step}") as watchdog:
        _run_epochs(fit, saver, watchdog)
        if fit.stopping.stopped:
            log.info(event="early_stop", epoch=fit.epoch, smape=fit.smape)
        saver.finish()


def _run_epochs(fit: Fit, saver: Saver, watchdog: Watchdog) -> None:
    pace = Pace()
    n_steps = fit.config.epochs * fit.n_batches
    with log.progress(standing(fit, pace), n_steps, done=fit.step, estimates=False) as show:
        while not fit.finished:
            _run_epoch(fit, saver, watchdog, pace, show)


def _run_epoch(fit: Fit, saver: Saver, watchdog: Watchdog, pace: Pace, show: log.Show) -> None:
    begun = time.monotonic()
    n_rows = len(fit.data.train) - min(fit.batch * fit.config.batch_size, len(fit.data.train))
    _train_epoch(fit, saver, watchdog, pace, show)
    trained = time.monotonic()
    facts = fit.end_epoch(trained - begun, watchdog.beat)
    watchdog.beat()
    ended = time.monotonic()
    pace.validated(ended - trained)
    show(fit.step, standing(fit, pace))
    left = seconds_left(fit, pace)
    log.info(**facts, rows_s=n_rows / (ended - begun), **({} if left is None else {"eta_s": left}))
    if not fit.finished:
        saver.agree()


def _train_epoch(fit: Fit, saver: Saver, watchdog: Watchdog, pace: Pace, show: log.Show) -> None:
    """Trains on what is left of the epoch, saving on the way."""
    step, started = fit.step, time.monotonic()

    def count() -> None:
        nonlocal step, started
        now = time.monotonic()
        pace.trained(fit.step - step, now - started)
        step, started = fit.step, now

    for _ in fit.run_epoch(watchdog.beat):
        saver.agree()
        watchdog.beat()
        count()
        show(fit.step, standing(fit, pace))
    saver.agree(may_save=False)
    count()


class Saver:
    """Decides, together with the other ranks, when to save and when to stop. Only rank 0 writes."""

    def __init__(self, config: RunConfig, fit: Fit, lease: Lease | None) -> None:
        self.config, self.fit, self.place = config, fit, fit.place
        self.run, self.started = run_url(config), time.monotonic()
        self.saved_at, self.saved_step = self.started, 0
        self.blocked, self.warned = 0.0, False
        self.writer: checkpoint.Writer | None = None
        if lease is not None:
            url = storage.join(self.run, "run.json")
            content = storage.read(url)
            facts = records.parse(RunFacts, content, url)
            lineage = {key: getattr(facts, key) for key in ("config_sha256", "data_sha256", "revision")}
            lineage["run_sha256"] = storage.sha256(content)
            lineage["split_sha256"] = storage.sha256(storage.read(storage.join(self.run, SPLIT)))
            lineage["code_sha256"] = code_digest("training")
            lineage["agreement"] = _agreement(fit)
            lineage["validation_sha256"] = validation_digest(fit.data.store, fit.data.validation, fit.data.prices)
            self.writer = checkpoint.Writer(self.run, fit.data.store.dims, lineage, lease.check, config.keep)

    def resume(self) -> None:
        """Goes on from the newest committed checkpoint that is whole, if there is one."""
        found = self.place.on_main(self._newest)
        if found is None:
            return
        made, best, state = found
        try:
            self.fit.restore(best, state)
        except (RuntimeError, KeyError, ValueError) as error:  # of torch: names or shapes that do not fit
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{made.url} was made by another version of this training: {reason}", "train under another --run-id"
            ) from error
        self.saved_step = self.fit.step
        if self.writer is not None:
            self.writer.resumed_from = made.url
            self.writer.committed.append(made.name)
        log.info(event="resumed", checkpoint=made.url, epoch=self.fit.epoch + 1, step=self.fit.step)

    def _newest(self) -> tuple[manifests.Checkpoint, dict[str, Tensor], dict[str, Any]] | None:
        assert self.writer is not None, "rank 0 writes"
        found = checkpoint.newest(self.run)
        self.writer.check_lease()
        checkpoint.forget_after(self.run, found[0].url if found else None)
        return found

    def agree(self, *, may_save: bool = True) -> None:
        """A moment at which all ranks do the same: add up losses, save when it is due, stop when one was asked to.

        Raises:
            StopRequested: after the commit, on every rank.
        """
        stop, due = self.fit.share_loss(float(stopping.requested()), float(self._is_due()))
        if not may_save:
            return
        if stop:
            self.place.on_main(lambda: self._save(wait=True))
            raise StopRequested(
                f"stopped on request at step {self.fit.step}, which is committed", "run the same command again to go on"
            )
        if due:
            self.place.on_main(self._save)

    def finish(self) -> None:
        """Commits the end of the training and points to it."""
        self.place.on_main(self._finish)

    def _is_due(self) -> bool:
        if self.writer is None:
            return False
        steps = self.config.checkpoint_steps
        if steps and self.fit.step - self.saved_step >= steps:
            return True
        return not self.writer.busy and time.monotonic() - self.saved_at >= self.config.checkpoint_seconds

    def _save(self, wait: bool = False) -> manifests.Checkpoint | None:
        """Starts a commit, or waits for it; what was committed when it waited."""
        assert self.writer is not None, "rank 0 writes"
        started = time.monotonic()
        if self.fit.step != self.saved_step:
            self.writer.submit(self.fit.snapshot())
        made = self.writer.wait() if wait else None
        self.saved_at, self.saved_step = time.monotonic(), self.fit.step
        self.blocked += self.saved_at - started
        self._check_grace()
        return made

    def _check_grace(self) -> None:
        assert self.writer is not None, "rank 0 writes"
        if self.writer.seconds > self.config.grace / 2 and not self.warned:
            self.warned = True
            log.warning(
                event="grace_too_short",
                commit_seconds=self.writer.seconds,
                grace=self.config.grace,
                hint="give the job a longer grace period and --grace",
            )

    def _finish(self) -> None:
        # Nothing is left to commit when an earlier attempt's last manifest arrived after this one had looked for it.
        made = self._save(wait=True) or manifests.committed(self.run)[-1]
        point_to_run(self.config, made)
        seconds = time.monotonic() - self.started
        log.info(event="finished", checkpoint=made.url, **_outcome(self.fit), blocked=self.blocked / seconds)


def _agreement(fit: Fit) -> dict[str, float]:
    """How much the roles agree on the training rows; predictions expect the same of their rows."""
    store, train = fit.data.store, fit.data.train
    rows = train[:: -(-len(train) // MAX_AGREEMENT_ROWS)]
    prints = fingerprints(fit.model, store, rows, fit.place.device)
    return agreements(pd.DataFrame(prints, columns=list(store.dims)))


def _log_start(fit: Fit) -> None:
    config = fit.config
    log.info(
        event="start",
        parameters=sum(p.numel() for p in fit.model.parameters()),
        steps_an_epoch=fit.n_batches,
        device=fit.place.device,
        loss=config.loss,
        batch_size=config.batch_size,
        lr=config.lr,
    )
    log.info(event="baseline", **_baseline(fit.data))


def _baseline(data: TrainingData) -> dict[str, float]:
    """The median of the training prices, and its SMAPE when it stands for all validation rows."""
    median = float(np.expm1(data.targets[data.train].median().item()))
    return {"median_price": median, "smape": compute_smape(data.prices, np.full_like(data.prices, median))}


def _outcome(fit: Fit) -> dict[str, object]:
    """How good the best epoch is, and how far from the end: if it was the last, more epochs may help."""
    best = min(fit.history, key=lambda entry: float(entry["smape"]))
    of_the_median = _baseline(fit.data)["smape"]
    return {"smape": fit.smape, "median_price_smape": of_the_median, "best_epoch": f"{best['epoch']}/{fit.epoch}"}


def read_data(config: RunConfig, place: World) -> TrainingData:
    """Reads and splits what the run is made of; writes `split.parquet` and `run.json`, or reads the split back."""
    started = time.monotonic()
    table = on_main_alone(place, lambda: _read_table(config))
    ids, prices = place.on_main(lambda: (held(table).ids, held(table).prices))
    store = load(config.data, "train", config.bindings(), ids, place, max_missing=config.max_missing)
    log.info(event="read", rows=len(ids), seconds=time.monotonic() - started)
    validates = torch.tensor(place.on_main(lambda: _split(config, held(table), store, place)))
    targets = torch.from_numpy(np.log1p(prices).astype(np.float32))
    train = torch.nonzero(~validates & store.any_present()).squeeze(1)
    validation = torch.nonzero(validates).squeeze(1)
    return TrainingData(store, targets, train, validation, prices[validates.numpy()])


def _read_table(config: RunConfig) -> Table:
    drop, hashed = config.drop_bad_prices, compared_columns(config)
    table = read_table(config.data, "train", priced=True, drop_bad_prices=drop, columns=(), hashed=hashed)
    warn_of_extreme_prices(table)
    warn_of_poor_prices(table)
    return table


def warn_of_extreme_prices(table: Table) -> None:
    """Names rows whose price is a million times the median, or a millionth of it: placeholders, or another unit."""
    distance = np.abs(np.log(table.prices) - np.log(np.median(table.prices)))
    extreme = np.flatnonzero(distance > np.log(EXTREME_PRICE))
    if extreme.size:
        first = ", ".join(f"{table.ids[row]} ({table.prices[row]:g})" for row in extreme[:5])
        log.warning(
            event="extreme_prices", rows=extreme.size, first=first, hint="correct these prices or leave them out"
        )


def _split(config: RunConfig, table: Table, store: RowStore, place: World) -> np.ndarray:
    """[N] bool: the row validates."""
    groups = near_duplicate_groups(table, {role: values.numpy() for role, values in store.values.items()}, config)
    quartiles = np.quantile(table.prices, [0.25, 0.5, 0.75]).tolist()
    rows = [table.digest(), storage.sha256(groups.astype(np.int64).tobytes())]
    describe_run(config, digest([*rows, store.digest()]), store.dims, quartiles, place.size)
    run = run_url(config)
    url = storage.join(run, SPLIT)
    if not storage.exists(url):
        storage.write(url, to_parquet(split_rows(table, groups, config)))
    made = manifests.committed(run)
    split = read_split(run, made[-1].manifest.split_sha256 if made else "")
    if not pd.Index(split["sample_id"]).equals(table.ids):  # describe_run has found the data to be the same
        raise DataError(f"{url} lists other rows than train.csv, or in another order", "train under another --run-id")
    return (split["side"] == "validation").to_numpy(bool)


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
