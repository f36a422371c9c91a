"""When a training is saved and when it stops: decided by all ranks together, written by rank 0 in the background."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from fusion import log, signals, storage
from fusion.config import RunConfig
from fusion.errors import DataError, StopRequested
from fusion.features.fitted import has_features
from fusion.features.rows import compared
from fusion.metrics import compute_smape
from fusion.prediction.predict import validation_digest
from fusion.records import checkpoint, manifests, schemas
from fusion.records.attempts import Lease
from fusion.records.best_run import point_to_run
from fusion.records.manifests import FEATURES, MEMORY, SPLIT
from fusion.records.provenance import code_digest
from fusion.records.run import FACTS, RunFolder
from fusion.records.schemas import RunFacts
from fusion.submissions.fingerprints import MAX_AGREEMENT_ROWS, agreements, fingerprints
from fusion.training.dataset import TrainingData
from fusion.training.trainer import Fit


class Saver:
    """Decides, together with the other ranks, when to save and when to stop. Only rank 0 writes."""

    def __init__(self, config: RunConfig, fit: Fit, lease: Lease | None) -> None:
        self.config, self.fit, self.world = config, fit, fit.world
        self.run, self.started = RunFolder.of(config), time.monotonic()
        self.saved_at, self.saved_step = self.started, 0
        self.blocked, self.warned = 0.0, False
        self.writer: checkpoint.Writer | None = None
        if lease is not None:
            url = self.run.at(FACTS)
            content = storage.read(url)
            facts = schemas.parse(RunFacts, content, url)
            lineage = {key: getattr(facts, key) for key in ("config_sha256", "data_sha256", "revision")}
            lineage["run_sha256"] = storage.sha256(content)
            lineage["split_sha256"] = storage.sha256(storage.read(self.run.at(SPLIT)))
            computed = storage.read_if_exists(self.run.at(FEATURES)) if has_features(config) else None
            lineage["features_sha256"] = "" if computed is None else storage.sha256(computed)
            if config.neighbours:
                lineage["memory_sha256"] = storage.sha256(storage.read(self.run.at(MEMORY)))
            lineage["code_sha256"] = code_digest("training")
            lineage["agreement"] = _agreement(fit)
            lineage["validation_sha256"] = validation_digest(fit.data.store, fit.data.validation, fit.data.prices)
            self.writer = checkpoint.Writer(self.run, fit.data.store.dims, lineage, lease.check, config.keep)

    def resume(self) -> None:
        """Goes on from the newest committed checkpoint that is whole, if there is one."""
        found = self.world.on_main(self._newest)
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
        stop, due = self.fit.share_loss(float(signals.requested()), float(self._is_due()))
        if not may_save:
            return
        if stop:
            self.world.on_main(lambda: self._save(wait=True))
            raise StopRequested(
                f"stopped on request at step {self.fit.step}, which is committed", "run the same command again to go on"
            )
        if due:
            self.world.on_main(self._save)

    def finish(self) -> None:
        """Commits the end of the training and points to it."""
        self.world.on_main(self._finish)

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
        made = self._save(wait=True) or self.run.checkpoints()[-1]
        point_to_run(self.config, made)
        seconds = time.monotonic() - self.started
        log.info(event="finished", checkpoint=made.url, **_outcome(self.fit), blocked=self.blocked / seconds)


def _agreement(fit: Fit) -> dict[str, float]:
    """How much the roles agree on the training rows; predictions expect the same of their rows."""
    store, train = fit.data.store, fit.data.train
    rows = train[:: -(-len(train) // MAX_AGREEMENT_ROWS)]
    store = compared(store)
    prints = fingerprints(fit.model, store, rows, fit.world.device)
    return agreements(pd.DataFrame(prints, columns=list(store.dims)))


def baseline(data: TrainingData) -> dict[str, float]:
    """The median of the training prices, and its SMAPE when it stands for all validation rows."""
    median = float(np.expm1(data.targets[data.train].median().item()))
    return {"median_price": median, "smape": compute_smape(data.prices, np.full_like(data.prices, median))}


def _outcome(fit: Fit) -> dict[str, object]:
    """How good the epoch is whose weights are kept, and how far from the end: if it was the last, more may help."""
    kept = [entry for entry in fit.history if entry["smape"] == fit.smape][-1]
    of_the_median = baseline(fit.data)["smape"]
    return {"smape": fit.smape, "median_price_smape": of_the_median, "best_epoch": f"{kept['epoch']}/{fit.epoch}"}
