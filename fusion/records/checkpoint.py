"""Checkpoints of a run: writes them in the background, commits them, removes old ones, and reads them for a resume.

A checkpoint is the folder `checkpoints/step-<n>/` with the weights, the state that training resumes from, and the
predictions for the validation rows. It is committed, that is, it exists for readers, once its `MANIFEST.json` is
written. Weights are stored as safetensors. The training state is read with `weights_only=True`, which accepts only
tensors and plain Python values, so that reading a checkpoint never executes code.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import safetensors.torch
import torch
from torch import Tensor

from fusion import log, storage
from fusion.errors import DataError, FusionError, SupersededError
from fusion.records import intervals
from fusion.records.manifests import (
    EPOCHS,
    INTERVALS,
    LINES,
    MODEL,
    STATE,
    VALIDATION,
    Checkpoint,
    best_of,
    dims_in,
    read_file,
    write_files,
)
from fusion.records.run import RunFolder
from fusion.records.schemas import SCHEMA, CheckpointManifest, FileEntry, seal
from fusion.records.validation import computed_in, has_validation, to_parquet, validation_of


@dataclass(frozen=True)
class Snapshot:
    """A copy of the training at one step, so that it can be written while the training goes on.

    Attributes:
        step: optimizer steps taken.
        weights: the model's state dict at its best validation so far.
        state: what a resumed training needs; tensors and plain values.
        facts: further fields of the manifest: epoch, smape, finished.
        validation: rows as `validation_frame` returns them; None before the first validation.
        category: name of the column whose values have prediction intervals of their own; empty if there is no such
            column.
    """

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    facts: dict[str, Any]
    validation: pd.DataFrame | None = None
    category: str = ""


class Writer:
    """Commits snapshots in a background thread, one at a time, and removes old checkpoints after each commit.

    Args:
        dims: role to the dimension of its embeddings.
        lineage: fields of the manifest that say what the run was made from: digests of config, data and code.
        check_lease: raises SupersededError if this process has lost the right to publish.
        keep: how many of the newest checkpoints to keep; see `prune` for those that are kept in addition.
    """

    def __init__(
        self,
        run: RunFolder,
        dims: Mapping[str, int],
        lineage: Mapping[str, Any],
        check_lease: Callable[[], None],
        keep: int,
    ) -> None:
        self.run, self.dims, self.lineage, self.check_lease, self.keep = run, dims, lineage, check_lease, keep
        self.resumed_from: str | None = None
        self.committed: list[str] = []  # names of the checkpoints that this attempt has committed or resumed from
        self.seconds = 0.0  # duration of the last commit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: Future[Checkpoint] | None = None

    @property
    def busy(self) -> bool:
        return self._flight is not None and not self._flight.done()

    def submit(self, snapshot: Snapshot) -> None:
        """Starts to write the snapshot. Waits first for the write in progress, and raises its error if it failed."""
        self.wait()
        self._flight = self._pool.submit(self._write, snapshot)

    def wait(self) -> Checkpoint | None:
        """Waits for the write in progress, if there is one; returns its checkpoint, or raises its error."""
        flight, self._flight = self._flight, None
        return flight.result() if flight else None

    def _write(self, snapshot: Snapshot) -> Checkpoint:
        started = time.monotonic()
        lineage = {**self.lineage, "earlier": self._kept_beside()}
        made = commit(self.run, snapshot, self.dims, lineage, self.check_lease)
        self.seconds = time.monotonic() - started
        known = {} if made.manifest.smape is None else {"smape": made.smape}  # None before the first validation
        log.info(event="committed", checkpoint=made.url, **known, seconds=self.seconds)
        with suppress(SupersededError):  # without the lease it must not prune: a newer attempt may be writing here
            self.check_lease()
            prune(self.run, self.keep, self.resumed_from)
        self.committed.append(made.name)
        return made

    def _kept_beside(self) -> tuple[str, ...]:
        """Names of the checkpoints that `prune` will keep beside the next one, as far as this attempt knows them.

        The manifest lists them, so that `fusion.verify` notices when one of them is lost.
        """
        resumed_from = [] if self.resumed_from is None else [storage.base(self.resumed_from)]
        newest = self.committed[1 - self.keep :] if self.keep > 1 else []
        return tuple(dict.fromkeys([*resumed_from, *newest]))


def commit(
    run: RunFolder,
    snapshot: Snapshot,
    dims: Mapping[str, int],
    lineage: Mapping[str, Any],
    check_lease: Callable[[], None],
) -> Checkpoint:
    """Writes `checkpoints/step-<n>/` of a run: the files first, the manifest last, which commits them.

    Raises:
        SupersededError: a newer attempt has taken the lease, or another process has committed this step.
    """
    folder = run.checkpoint(f"step-{snapshot.step:08d}")
    contiguous = {name: tensor.contiguous() for name, tensor in snapshot.weights.items()}
    files = {
        MODEL: safetensors.torch.save(contiguous, {"dims": json.dumps(dict(dims))}),
        STATE: _torch_bytes(snapshot.state),
    }
    files |= _of_validation(snapshot)
    check_lease()
    if folder.is_committed():  # with a damaged checkpoint of this step, which the resume skipped
        storage.remove(folder.manifest_url)
    history = _write_history(run, snapshot.state["history"])
    try:
        written = write_files(folder, files)
    except (FusionError, OSError):
        check_lease()  # a newer attempt may have removed this folder: then that is the error to report
        raise
    manifest = CheckpointManifest(SCHEMA, written, step=snapshot.step, history=history, **snapshot.facts, **lineage)
    check_lease()
    if not storage.create(folder.manifest_url, seal(asdict(manifest))):
        raise SupersededError(f"another process has committed {folder}", "let it finish; run one job per --run-id")
    return Checkpoint(folder.url, manifest)


def _of_validation(snapshot: Snapshot) -> dict[str, bytes]:
    """The files with the predictions of the validation rows, and with the intervals that are fitted to them."""
    if snapshot.validation is None:
        return {}
    made = intervals.fit(snapshot.validation, snapshot.category)
    others = {} if made is None else {INTERVALS: seal(asdict(made))}
    return {VALIDATION: to_parquet(snapshot.validation), **others}


def _write_history(run: RunFolder, history: Sequence[Mapping[str, Any]]) -> tuple[FileEntry, ...]:
    # Written before the manifest, because a run counts as finished once the manifest of its last checkpoint exists.
    if not history:
        return ()
    lines = "".join(f"{json.dumps(row)}\n" for row in history)
    files = {LINES: lines.encode(), EPOCHS: pd.DataFrame(history).to_csv(index=False).encode()}
    return tuple(write_files(run.metrics, files))


def prune(run: RunFolder, keep: int, resumed_from: str | None) -> None:
    """Removes old checkpoints, and folders that a kill left without a manifest, if older than the newest checkpoint.

    Kept are the `keep` newest checkpoints, the best, the one resumed from, and the newest that was followed by a
    validation: the ones after it may come from a training that has diverged. Of each removed checkpoint the manifest
    goes first, so that readers never see a committed checkpoint without its files.
    """
    found = run.checkpoints()
    if not found:
        return
    kept = {checkpoint.url for checkpoint in [*found[-keep:], *_validated(found), best_of(found)]} | {resumed_from}
    for folder in run.ls("checkpoints"):
        if folder.url not in kept and folder.url < found[-1].url:
            try:
                storage.remove(folder.manifest_url)
                storage.remove(folder.url)
            except (FusionError, OSError) as error:  # an older attempt may be writing there; the next prune tries again
                log.warning(event="not_pruned", checkpoint=folder, reason=error)


def _validated(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The newest checkpoint that was followed by a validation, as a list of one; empty before the first validation."""
    return [made for made in found if made.manifest.epoch < found[-1].manifest.epoch][-1:]


def forget_after(run: RunFolder, url: str | None) -> None:
    """Removes the manifests of the checkpoints that are newer than the one at `url`; of all if `url` is None.

    `newest` found those damaged. If their manifests stayed, they would still count as the newest: `prune` would keep
    them, and the check that a stopped run has made progress would be wrong.
    """
    for checkpoint in run.checkpoints():
        if url is None or checkpoint.url > url:
            storage.remove(checkpoint.manifest_url)


def newest(run: RunFolder) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Any]] | None:
    """The newest committed checkpoint that can be resumed from, with its weights and its training state.

    The state has one more key, "validated": what the weights compute for the validation rows, in the form that `Fit`
    uses. Checkpoints that are damaged, or hold numbers that are not finite, are named in the log and skipped. Returns
    None if no checkpoint is left.
    """
    for checkpoint in reversed(run.checkpoints()):
        try:
            weights = safetensors.torch.load(read_file(checkpoint, MODEL))
            state = torch.load(io.BytesIO(read_file(checkpoint, STATE)), map_location="cpu", weights_only=True)
            state["validated"] = computed_in(validation_of(checkpoint)) if has_validation(checkpoint) else None
        except DataError as error:
            log.warning(event="checkpoint_damaged", checkpoint=checkpoint.url, reason=error.message)
            continue
        wrong = not_finite({"best": weights, **state})
        if wrong is None:
            return checkpoint, weights, state
        log.warning(event="checkpoint_not_finite", checkpoint=checkpoint.url, first=wrong)
    return None


def not_finite(value: Any, name: str = "") -> str | None:
    """Dotted name of the first tensor or loss sum in nested dicts and lists that is not finite; None if all are."""
    if isinstance(value, Tensor):
        return None if bool(torch.isfinite(value).all()) else name
    if name.endswith("loss_sum"):  # other numbers may be infinite, such as the best SMAPE before the first validation
        return None if math.isfinite(value) else name
    for key, inner in _items(value):
        wrong = not_finite(inner, f"{name}.{key}".strip("."))
        if wrong is not None:
            return wrong
    return None


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Key and value of each item of a dict, index and value of each of a list; nothing for other values."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def read_model(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights, and the dimension of the embeddings of each role; logs which checkpoint is used."""
    data = read_file(checkpoint, MODEL)
    log.info(event="model", checkpoint=checkpoint.url, smape=checkpoint.manifest.smape)
    return safetensors.torch.load(data), dims_in(data)


def _torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
