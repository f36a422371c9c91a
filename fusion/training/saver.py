"""`Saver`: decides when a training is saved and when it stops. All ranks decide together; rank 0 alone writes."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fusion import log, signals, storage
from fusion.config import RunConfig
from fusion.distributed.world import held
from fusion.errors import DataError, StopRequested
from fusion.features.fitted import has_features
from fusion.features.rows import compared
from fusion.prediction.predict import validation_digest
from fusion.records import checkpoint, manifests, schemas
from fusion.records.attempts import Lease
from fusion.records.best_run import point_to_run
from fusion.records.manifests import BASELINES, FEATURES, MEMORY, SPLIT
from fusion.records.provenance import code_digest
from fusion.records.run import FACTS, RunFolder
from fusion.records.schemas import RunFacts
from fusion.submissions.fingerprints import MAX_AGREEMENT_ROWS, agreements, fingerprints
from fusion.training.trainer import Fit


class Saver:
    """Saves a training, resumes it, and stops it on request, together with the other ranks.

    Checkpoints are written in the background, while the training goes on.

    Args:
        lease: this attempt's right to write to the run's folder; None on all ranks but 0, which do not write.
    """

    def __init__(self, config: RunConfig, fit: Fit, lease: Lease | None) -> None:
        self.config, self.fit, self.world = config, fit, fit.world
        self.run, self.started = RunFolder.of(config), time.monotonic()
        self.saved_at, self.saved_step = self.started, 0
        self.blocked = 0.0  # seconds in which saving has kept the training waiting
        self.warned = False
        self.writer: checkpoint.Writer | None = None
        prints, validated = _sample_fingerprints(fit), _validation_digest(fit)
        if lease is not None:
            lineage = _lineage(self.run, fit, held(prints)) | {"validation_sha256": held(validated)}
            self.writer = checkpoint.Writer(self.run, fit.data.store.dims, lineage, lease.check, config.keep)

    def resume(self) -> None:
        """Restores the newest committed checkpoint that is not damaged, if there is one.

        Raises:
            DataError: the checkpoint is that of another version.
        """
        found = self.world.on_main(self._newest)
        if found is None:
            return
        made, best, state = found
        try:
            self.fit.restore(best, state)
        except (RuntimeError, KeyError, ValueError) as error:  # torch raises these for unknown names or other shapes
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
        """Reads the newest usable checkpoint, and removes the remains of later ones, which are damaged or unfinished.

        Returns:
            The checkpoint, the weights of its best validation, and the state of its training.
        """
        assert self.writer is not None, "rank 0 writes"
        found = checkpoint.newest(self.run)
        self.writer.check_lease()
        checkpoint.forget_after(self.run, found[0].url if found else None)
        return found

    def agree(self, *, may_save: bool = True) -> None:
        """Synchronises the ranks: adds up their losses, saves if a save is due, and stops if any rank got a signal.

        Args:
            may_save: False: only adds up the losses.

        Raises:
            StopRequested: a rank got a signal. All ranks raise it, after the training is committed.
        """
        stop, due = self.fit.share_loss(float(signals.requested()), float(self._is_due()))
        if not may_save:
            return
        if stop:
            self.world.on_main(lambda: self._save(wait=True))
            raise StopRequested(
                f"stopped on request at step {self.fit.step}, which is committed",
                "run the same command again to resume",
            )
        if due:
            self.world.on_main(self._save)

    def finish(self) -> manifests.Checkpoint | None:
        """Commits the last checkpoint, and moves the pointers to the run if it is the newest or the best.

        Returns:
            The checkpoint, on rank 0; None on other ranks.
        """
        return self.world.on_main_alone(self._finish)

    def _is_due(self) -> bool:
        """Whether a save is due by --checkpoint-steps, or by --checkpoint-seconds while no commit is in progress.

        False on ranks that do not write.
        """
        if self.writer is None:
            return False
        steps = self.config.checkpoint_steps
        if steps and self.fit.step - self.saved_step >= steps:
            return True
        return not self.writer.busy and time.monotonic() - self.saved_at >= self.config.checkpoint_seconds

    def _save(self, wait: bool = False) -> manifests.Checkpoint | None:
        """Starts to commit the current step in the background, unless it is saved already.

        Returns:
            With `wait`, the checkpoint once it is committed, if there was anything to commit; otherwise None.
        """
        assert self.writer is not None, "rank 0 writes"
        started = time.monotonic()
        if self.fit.step != self.saved_step:
            self.writer.submit(self.fit.snapshot())
        with log.waiting("saving the checkpoint") if wait else nullcontext():
            made = self.writer.wait() if wait else None
        self.saved_at, self.saved_step = time.monotonic(), self.fit.step
        self.blocked += self.saved_at - started
        self._check_grace()
        return made

    def _check_grace(self) -> None:
        """Warns once if a commit takes more than half of --grace.

        A stop signal may come during a commit: then that one and another have to be written before the kill.
        """
        assert self.writer is not None, "rank 0 writes"
        if self.writer.seconds > self.config.grace / 2 and not self.warned:
            self.warned = True
            log.warning(
                event="grace_too_short",
                commit_seconds=self.writer.seconds,
                grace=self.config.grace,
                hint="raise the grace period of the job, and --grace with it",
            )

    def _finish(self) -> manifests.Checkpoint:
        # `_save` returns None if an earlier attempt has already committed this step: its manifest may reach the store
        # late, after this attempt looked for the newest checkpoint.
        made = self._save(wait=True) or self.run.checkpoints()[-1]
        point_to_run(self.config, made)
        return made


def _lineage(run: RunFolder, fit: Fit, prints: np.ndarray) -> dict[str, Any]:
    """Returns what the manifest of every checkpoint says about its origin: digests of config, data and code."""
    url = run.at(FACTS)
    content = storage.read(url)
    facts = schemas.parse(RunFacts, content, url)
    lineage = {key: getattr(facts, key) for key in ("config_sha256", "data_sha256", "revision")}
    lineage["run_sha256"] = storage.sha256(content)
    lineage["split_sha256"] = storage.sha256(storage.read(run.at(SPLIT)))
    computed = storage.read_if_exists(run.at(FEATURES)) if has_features(fit.config) else None
    known = storage.read_if_exists(run.at(BASELINES))
    lineage["baselines_sha256"] = "" if known is None else storage.sha256(known)
    lineage["features_sha256"] = "" if computed is None else storage.sha256(computed)
    if fit.config.neighbours:
        lineage["memory_sha256"] = storage.sha256(storage.read(run.at(MEMORY)))
    lineage["code_sha256"] = code_digest("training")
    lineage["agreement"] = _agreement(fit, prints)
    return lineage


def _agreement(fit: Fit, prints: np.ndarray) -> dict[str, float]:
    """Returns, for each pair of roles, how much their similarities agree on a sample of the training rows.

    Predictions compare their rows with these values, to detect embeddings that belong to other rows.
    """
    return agreements(pd.DataFrame(prints, columns=list(compared(fit.data.store).dims)))


def _sample_fingerprints(fit: Fit) -> np.ndarray | None:
    """Returns the fingerprints [n, R] of the sample, on rank 0; None on other ranks. All ranks call this."""
    train, store = fit.data.train, compared(fit.data.store)
    stride = -(-len(train) // MAX_AGREEMENT_ROWS)  # rounded up
    rows = train[::stride]

    def compute() -> np.ndarray:
        return fingerprints(fit.model, store, store.own(rows), fit.world.device)

    if store.nodes is None:
        return fit.world.on_main_alone(compute)
    found = store.nodes.joined(lambda: torch.from_numpy(compute().view(np.int64)), fit.world)
    return None if found is None else found.numpy().view(np.uint64)


def _validation_digest(fit: Fit) -> str | None:
    """Returns the sha256 of the validation rows, on rank 0; None on other ranks. All ranks call this."""
    store, rows = fit.data.store, fit.data.validation
    if store.nodes is not None:
        return validation_digest(store.nodes_digest(fit.world, rows), fit.data.prices)
    return fit.world.on_main_alone(lambda: validation_digest(store.digest_of(rows), fit.data.prices))
