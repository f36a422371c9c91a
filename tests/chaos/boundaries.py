"""Lists all boundaries of a training, an evaluation and a prediction, and kills a process with SIGKILL at some of them.

A boundary is the moment before, inside or after a write of a certain kind or the end of an epoch. The kind of a write
follows from its URL. Inside a write, half of the object's bytes are in the file or have been sent to the socket (over
plain HTTP); inside a removal, half of the objects have been removed; inside the end of an epoch, the model has been
validated. A write of no known kind is an error, so that the list stays complete.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import IO, Any

from fusion import storage
from fusion.storage import backend, conditional
from fusion.training import trainer

# Patterns of the kinds, in the order in which a run reaches them. Of several that match, the first applies.
KINDS = {
    "config": "write */runs/r/config.json",
    "probe": "* */runs/r/.probe-*",
    "lease": "write */runs/r/lease.json",
    "attempt-start": "write */runs/r/attempts/*/start.json",
    "features": "write */runs/r/features.safetensors",
    "run": "write */runs/r/run.json",
    "split": "write */runs/r/split.parquet",
    "memory": "write */runs/r/memory.safetensors",
    "baselines": "write */runs/r/baselines.json",
    "history-by-line": "write */runs/r/metrics/train.jsonl",
    "history-as-table": "write */runs/r/metrics/epochs.csv",
    "model": "write */runs/r/checkpoints/*/model.safetensors",
    "state": "write */runs/r/checkpoints/*/state.pt",
    "checkpoint-validation": "write */runs/r/checkpoints/*/validation.parquet",
    "checkpoint-intervals": "write */runs/r/checkpoints/*/intervals.json",
    "checkpoint-manifest": "write */runs/r/checkpoints/*/MANIFEST.json",
    "epoch-end": "end epoch",
    "prune-manifest": "remove */runs/r/checkpoints/*/MANIFEST.json",
    "prune": "remove */runs/r/checkpoints/*",
    "latest": "write */pointers/runs/*/latest.json",
    "best-of-kind": "write */pointers/runs/*/best-*.json",
    "best": "write */pointers/runs/*/best.json",
    "attempt-log": "write */runs/r/attempts/*/log.txt",
    "attempt-exit": "write */runs/r/attempts/*/exit.json",
    "model-card": "write */runs/r/model_card.md",
    "report": "write */runs/r/report.html",
    "evaluation-part": "write */runs/r/parts/*",
    "metrics-manifest-gone": "remove */runs/r/metrics/MANIFEST.json",
    "groups-as-parquet": "write */runs/r/metrics/groups.parquet",
    "validation-predictions": "write */runs/r/metrics/predictions.parquet",
    "groups-as-table": "write */runs/r/metrics/groups.csv",
    "summary": "write */runs/r/metrics/summary.json",
    "metrics-manifest": "write */runs/r/metrics/MANIFEST.json",
    "evaluation-parts-gone": "remove */runs/r/parts",
    "ablation": "write */runs/r/metrics/ablation.json",
    "prediction-part": "write */parts/*",
    "submission": "write */submissions/*/submission.csv",
    "predictions": "write */submissions/*/predictions.parquet",
    "fingerprints": "write */submissions/*/fingerprints.parquet",
    "submission-manifest": "write */submissions/*/MANIFEST.json",
    "current": "write */pointers/submissions/*/current.json",
    "prediction-parts-gone": "remove */parts/*",
}
# Kinds of `fusion.prepare`, which a run does not reach.
PREPARATION = {
    "preparation-begins": "write */embeddings/*/_UNFINISHED",
    "prepared-shard": "write */embeddings/*/part-*.parquet",
    "surplus-shard-gone": "remove */embeddings/*/part-*.parquet",
    "source-manifest": "write */embeddings/*/_MANIFEST.json",
    "preparation-ends": "remove */embeddings/*/_UNFINISHED",
    "prepared-table": "write */train.csv",
}
# Further kinds of `fusion.prepare --engine ray`.
STAGING = {
    "staged-shard": "write */embeddings/*/_staging/*/part-*.parquet",
    "staging-gone": "remove */embeddings/*/_staging*",
}
# Kinds of a training with --tensorboard.
TRACKING = {"tensorboard-segment": "write */runs/r/tensorboard/events.out.tfevents.*"}
EVERY_KIND = KINDS | STAGING | PREPARATION | TRACKING
# Kinds that a run reaches many times, of which `skip` may pass over some.
REPEATED = ("history-by-line", "history-as-table", "model", "state", "checkpoint-manifest", "epoch-end")
REPEATED += ("checkpoint-validation", "checkpoint-intervals", "prune-manifest", "prune")
ON_ALL_RANKS = ("epoch-end", "evaluation-part", "prediction-part")  # rank 0 alone reaches the others
WITHOUT_INSIDE = (
    "prune-manifest",
    "metrics-manifest-gone",
    "surplus-shard-gone",
    "preparation-ends",
)  # the removal of a single object


@dataclass(frozen=True)
class Boundary:
    """A moment at which a process can be killed: `when` is before, inside or after."""

    kind: str
    when: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.when}"

    @staticmethod
    def named(text: str) -> Boundary:
        """The boundary that is written as `kind:when`; raises ValueError when there is none."""
        return ALL[[str(boundary) for boundary in ALL].index(text)]

    @property
    def on_all_ranks(self) -> bool:
        """Whether all ranks reach the boundary, and not rank 0 alone."""
        return self.kind in ON_ALL_RANKS


def boundaries_of(kinds: Iterable[str]) -> list[Boundary]:
    return [
        Boundary(kind, when)
        for kind in kinds
        for when in ("before", "inside", "after")
        if when != "inside" or kind not in WITHOUT_INSIDE
    ]


ALL = boundaries_of(KINDS)


class KillSwitch:
    """Kills this process with SIGKILL at the first of the boundaries that it reaches.

    Args:
        skip: how often a boundary of the kinds REPEATED is passed over before.
        reached: file to which the boundary is written, as a line, just before the kill.
    """

    def __init__(self, boundaries: Sequence[Boundary], skip: int, reached: IO[bytes]) -> None:
        self.boundaries, self.reached = boundaries, reached
        self.skip = dict.fromkeys(REPEATED, skip)
        # .active is true within the action that ends with the kill. It is per thread, as others may be writing too.
        self.here = threading.local()
        self.payload = b""  # the bytes of which only the first half is to be written
        self.cut: Boundary | None = None  # the boundary inside of which the payload is written

    def kill(self, boundary: Boundary | None) -> None:
        os.write(self.reached.fileno(), f"{boundary}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def run(self, action: str, do: Callable[[], Any], inside: Callable[[Boundary], Any]) -> Any:
        """Returns the result of `do`, unless `action` is at a boundary at which the process is to be killed.

        Args:
            action: the verb and the URL that KINDS match.
            inside: does half of the action, and kills the process.
        """
        boundary = None if getattr(self.here, "active", False) else self._next(action)
        if boundary is None:
            return do()
        if boundary.when == "before":
            self.kill(boundary)
        self.here.active = True
        result = inside(boundary) if boundary.when == "inside" else do()
        self.here.active = False
        if boundary.when == "after":
            self.kill(boundary)
        return result

    def _next(self, action: str) -> Boundary | None:
        kind = next((kind for kind, pattern in EVERY_KIND.items() if fnmatchcase(action, pattern)), None)
        if kind is None:
            raise RuntimeError(f"{action!r} matches no kind of boundary: add one to KINDS, PREPARATION or STAGING")
        found = next((boundary for boundary in self.boundaries if boundary.kind == kind), None)
        if found and self.skip.get(kind):
            self.skip[kind] -= 1
            return None
        return found


def arm(boundaries: Sequence[Boundary], skip: int, reached: IO[bytes]) -> None:
    """Lets this process be killed at the first of these boundaries that it reaches; see `KillSwitch`.

    Replaces the functions of storage and training that write, for the rest of the process.
    """
    switch = KillSwitch(boundaries, skip, reached)
    for module, name in ((backend, "put"), (conditional, "create"), (conditional, "replace")):
        setattr(module, name, _killing_write(switch, getattr(module, name)))
    storage.remove = _killing_removal(switch, storage.remove)
    trainer.Fit.end_epoch = _killing_end(switch, trainer.Fit.end_epoch)  # type: ignore[method-assign]
    backend.open = partial(_cut_file, switch)  # type: ignore[attr-defined]
    for name in ("send", "sendmsg"):
        setattr(socket.socket, name, _cut_socket(switch, getattr(socket.socket, name)))


def _killing_write(switch: KillSwitch, write: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(url: str, data: bytes, *more: Any) -> Any:
        def inside(boundary: Boundary) -> Any:
            switch.payload, switch.cut = data, boundary
            return write(url, data, *more)

        return switch.run(f"write {url}", lambda: write(url, data, *more), inside)

    return wrapped


def _killing_removal(switch: KillSwitch, remove: Callable[[str], None]) -> Callable[[str], None]:
    def wrapped(url: str) -> None:
        def inside(boundary: Boundary) -> None:
            objects = storage.ls(url)
            for one in objects[: len(objects) // 2]:
                remove(one)
            switch.kill(boundary)

        switch.run(f"remove {url}", lambda: remove(url), inside)

    return wrapped


def _killing_end(switch: KillSwitch, end_epoch: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(fit: trainer.Fit, seconds: float, beat: trainer.Beat) -> Any:
        def inside(boundary: Boundary) -> None:
            fit._validate(beat)
            switch.kill(boundary)

        return switch.run("end epoch", lambda: end_epoch(fit, seconds, beat), inside)

    return wrapped


def _cut_file(switch: KillSwitch, path: str, mode: str) -> IO[Any]:
    """A replacement for `open` that writes half of the payload, and kills the process."""

    class Cut(io.FileIO):
        def write(self, data: Any) -> int:
            if data is switch.payload:
                super().write(data[: len(data) // 2])
                switch.kill(switch.cut)
            return super().write(data)

    return Cut(path, mode) if switch.payload else open(path, mode)


def _cut_socket(switch: KillSwitch, send: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement for `send` or `sendmsg` that sends the payload's request up to half of the payload, and kills."""

    def wrapped(self: socket.socket, data: Any, *more: Any) -> Any:
        sent = b"".join(data) if isinstance(data, list | tuple) else bytes(data)
        body = sent.partition(b"\r\n\r\n")[2] if sent.startswith(b"PUT ") else sent
        if switch.payload and body and switch.payload.startswith(body[: len(switch.payload)]):
            self.sendall(sent[: len(sent) - len(body) + len(switch.payload) // 2])
            switch.kill(switch.cut)
        return send(self, data, *more)

    return wrapped
