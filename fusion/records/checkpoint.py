"""What a run must remember: weights and training state, written in the background and committed by a manifest.

Weights are safetensors; nothing here is ever unpickled but tensors and plain values.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
    MANIFEST,
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
    """What is to be remembered of one moment, in this process's own memory.

    Attributes:
        step: optimizer steps taken.
        weights: the model's state dict at its best validation so far.
        state: what training needs to go on; tensors and plain values.
        facts: what else the manifest says: epoch, smape, finished.
        validation: as of `validation_frame`; None before the first validation.
        category: name of the column that the category of a row is; empty: there is none.
    """

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    facts: dict[str, Any]
    validation: pd.DataFrame | None = None
    category: str = ""


class Writer:
    """Commits snapshots in the background, one at a time, and prunes what is no longer needed.

    Args:
        check_lease: raises when this process has lost the right to publish.
        keep: newest committed checkpoints that stay; the best, and the one resumed from, stay too.
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
        self.committed: list[str] = []  # names of those this attempt has made, or resumed from
        self.seconds = 0.0  # what the last commit took
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: Future[Checkpoint] | None = None

    @property
    def busy(self) -> bool:
        return self._flight is not None and not self._flight.done()

    def submit(self, snapshot: Snapshot) -> None:
        """Starts writing; waits first for the one in flight, and raises what went wrong with it."""
        self.wait()
        self._flight = self._pool.submit(self._write, snapshot)

    def wait(self) -> Checkpoint | None:
        """Waits for the one in flight, if any; it is committed, or its error is raised."""
        flight, self._flight = self._flight, None
        return flight.result() if flight else None

    def _write(self, snapshot: Snapshot) -> Checkpoint:
        started = time.monotonic()
        lineage = {**self.lineage, "earlier": self._kept_beside()}
        made = commit(self.run, snapshot, self.dims, lineage, self.check_lease)
        self.seconds = time.monotonic() - started
        known = {} if made.manifest.smape is None else {"smape": made.smape}  # not before the first validation
        log.info(event="committed", checkpoint=made.url, **known, seconds=self.seconds)
        with suppress(SupersededError):  # what a newer attempt is writing is not for this one to remove
            self.check_lease()
            prune(self.run, self.keep, self.resumed_from)
        self.committed.append(made.name)
        return made

    def _kept_beside(self) -> tuple[str, ...]:
        """Names of the checkpoints that pruning leaves beside the next one, as far as this attempt knows them."""
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
    """Writes `checkpoints/step-…` of a run; it exists from the moment its manifest is written, which is last."""
    folder = run.checkpoint_url(f"step-{snapshot.step:08d}")
    contiguous = {name: tensor.contiguous() for name, tensor in snapshot.weights.items()}
    files = {
        MODEL: safetensors.torch.save(contiguous, {"dims": json.dumps(dict(dims))}),
        STATE: _torch_bytes(snapshot.state),
    }
    files |= _of_validation(snapshot)
    url = storage.join(folder, MANIFEST)
    check_lease()
    if storage.exists(url):  # of one that was damaged, and so passed over
        storage.remove(url)
    history = _write_history(run, snapshot.state["history"])
    try:
        written = write_files(folder, files)
    except (FusionError, OSError):
        check_lease()  # a newer attempt prunes what an older one is still writing
        raise
    manifest = CheckpointManifest(SCHEMA, written, step=snapshot.step, history=history, **snapshot.facts, **lineage)
    check_lease()
    if not storage.create(url, seal(asdict(manifest))):
        raise SupersededError(f"another process has committed {folder}", "let it finish; run one job per --run-id")
    return Checkpoint(folder, manifest)


def _of_validation(snapshot: Snapshot) -> dict[str, bytes]:
    """What the best weights predict for the validation rows, and the intervals that follow from it."""
    if snapshot.validation is None:
        return {}
    made = intervals.fit(snapshot.validation, snapshot.category)
    others = {} if made is None else {INTERVALS: seal(asdict(made))}
    return {VALIDATION: to_parquet(snapshot.validation), **others}


def _write_history(run: RunFolder, history: Sequence[Mapping[str, Any]]) -> tuple[FileEntry, ...]:
    # Before the manifest: a run with its last checkpoint is finished.
    if not history:
        return ()
    lines = "".join(f"{json.dumps(row)}\n" for row in history)
    files = {LINES: lines.encode(), EPOCHS: pd.DataFrame(history).to_csv(index=False).encode()}
    return tuple(write_files(run.metrics, files))


def prune(run: RunFolder, keep: int, resumed_from: str | None) -> None:
    """Removes committed checkpoints but the `keep` newest, the best and the one resumed from: each manifest first.

    The newest that a validation has confirmed stays too: those after it may come from a training that has diverged.
    What a kill has left of one that is older than the newest goes as well.
    """
    found = run.checkpoints()
    if not found:
        return
    kept = {checkpoint.url for checkpoint in [*found[-keep:], *_validated(found), best_of(found)]} | {resumed_from}
    for url in storage.ls(run.at("checkpoints")):
        if url not in kept and url < found[-1].url:
            try:
                storage.remove(storage.join(url, MANIFEST))
                storage.remove(url)
            except (FusionError, OSError) as error:  # an older attempt may be writing it; the next commit tries again
                log.warning(event="not_pruned", checkpoint=url, reason=error)


def _validated(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The newest checkpoint whose training went on to a validation, in a list; empty before the first validation."""
    return [made for made in found if made.manifest.epoch < found[-1].manifest.epoch][-1:]


def forget_after(run: RunFolder, url: str | None) -> None:
    """Removes the manifests of the checkpoints after this one, or of all: `newest` found them damaged.

    They would count as the newest, for pruning and for whether the run gets on.
    """
    for checkpoint in run.checkpoints():
        if url is None or checkpoint.url > url:
            storage.remove(storage.join(checkpoint.url, MANIFEST))


def newest(run: RunFolder) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Any]] | None:
    """The newest committed checkpoint that can be resumed from, with its weights and its state.

    The state also has "validated", what the weights compute of the validation rows, as a `Fit` has it.

    One that is damaged, or not finite, is named in the log and passed over.
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
    """Name of the first tensor or loss sum, through dicts and lists, that is not finite; None when all are."""
    if isinstance(value, Tensor):
        return None if bool(torch.isfinite(value).all()) else name
    if name.endswith("loss_sum"):  # other numbers may be infinite, such as the best SMAPE before the first validation
        return None if math.isfinite(value) else name
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    found = (not_finite(each, f"{name}.{key}".strip(".")) for key, each in inner)
    return next((wrong for wrong in found if wrong is not None), None)


def read_model(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights and the dimension of every role."""
    data = read_file(checkpoint, MODEL)
    log.info(event="model", checkpoint=checkpoint.url, smape=checkpoint.manifest.smape)
    return safetensors.torch.load(data), dims_in(data)


def _torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
