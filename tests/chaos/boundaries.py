"""Every boundary of a training, an evaluation and a prediction, and SIGKILL that waits for a process at some of them.

A boundary is a kind of write, by its URL, or the end of an epoch: before, inside or after it. Inside a write, half of
the object's bytes are in the file or have left the socket (plain HTTP); inside a removal, half of the objects are
gone; inside the end of an epoch, the model has been validated. Whatever a process writes must be of one of the kinds.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import IO, Any

from fusion import storage
from fusion.storage import backend, conditional
from fusion.training import trainer

# In the order in which they are met. Of several that match, the first counts.
KINDS = {
    "config": "write */runs/r/config.json",
    "probe": "* */runs/r/.probe-*",
    "lease": "write */runs/r/lease.json",
    "attempt-start": "write */runs/r/attempts/*/start.json",
    "features": "write */runs/r/features.safetensors",
    "run": "write */runs/r/run.json",
    "split": "write */runs/r/split.parquet",
    "memory": "write */runs/r/memory.safetensors",
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
REPEATED = ("history-by-line", "history-as-table", "model", "state", "checkpoint-manifest", "epoch-end")
REPEATED += ("checkpoint-validation", "checkpoint-intervals", "prune-manifest", "prune")
EVERYBODYS = ("epoch-end", "evaluation-part", "prediction-part")
WHOLE = ("prune-manifest", "metrics-manifest-gone")  # one object is removed: nothing is inside


@dataclass(frozen=True)
class Boundary:
    kind: str
    when: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.when}"

    @staticmethod
    def named(text: str) -> Boundary:
        """The boundary `kind:when`; ValueError when there is none."""
        return ALL[[str(boundary) for boundary in ALL].index(text)]

    @property
    def everybodys(self) -> bool:
        """Whether every rank comes here, and not rank 0 alone."""
        return self.kind in EVERYBODYS


ALL = [
    Boundary(kind, when)
    for kind in KINDS
    for when in ("before", "inside", "after")
    if when != "inside" or kind not in WHOLE
]


class Ambush:
    """SIGKILL to this process at the first of the boundaries that it meets; `met` is told which, just before."""

    def __init__(self, boundaries: Sequence[Boundary], skip: int, met: IO[bytes]) -> None:
        self.boundaries, self.met = boundaries, met
        self.skip = dict.fromkeys(REPEATED, skip)
        self.here = threading.local()  # .struck: within what is struck; another thread may be writing meanwhile
        self.payload = b""  # of which no more than half is to be sent
        self.cut: Boundary | None = None

    def strike(self, boundary: Boundary | None) -> None:
        os.write(self.met.fileno(), f"{boundary}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def meets(self, action: str, do: Callable[[], Any], inside: Callable[[Boundary], Any]) -> Any:
        """Result of `do`; of `inside`, which does not live to return, where that is waited for."""
        boundary = None if getattr(self.here, "struck", False) else self._next(action)
        if boundary is None:
            return do()
        if boundary.when == "before":
            self.strike(boundary)
        self.here.struck = True
        result = inside(boundary) if boundary.when == "inside" else do()
        self.here.struck = False
        if boundary.when == "after":
            self.strike(boundary)
        return result

    def _next(self, action: str) -> Boundary | None:
        kind = next((kind for kind, pattern in KINDS.items() if fnmatchcase(action, pattern)), None)
        if kind is None:
            raise RuntimeError(f"{action!r} is none of the boundaries: give it a kind")
        found = next((boundary for boundary in self.boundaries if boundary.kind == kind), None)
        if found and self.skip.get(kind):
            self.skip[kind] -= 1
            return None
        return found


def arm(boundaries: Sequence[Boundary], skip: int, met: IO[bytes]) -> None:
    """From now on, the first of these boundaries that this process meets is its end.

    Args:
        skip: times that a boundary which comes again and again is passed by.
        met: a file; a line with the boundary is written to it.
    """
    ambush = Ambush(boundaries, skip, met)
    for module, name in ((backend, "put"), (conditional, "create"), (conditional, "replace")):
        setattr(module, name, _deadly_write(ambush, getattr(module, name)))
    storage.remove = _deadly_removal(ambush, storage.remove)
    trainer.Fit.end_epoch = _deadly_end(ambush, trainer.Fit.end_epoch)  # type: ignore[method-assign]
    backend.open = partial(_cut_file, ambush)  # type: ignore[attr-defined]
    for name in ("send", "sendmsg"):
        setattr(socket.socket, name, _cut_socket(ambush, getattr(socket.socket, name)))


def _deadly_write(ambush: Ambush, write: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(url: str, data: bytes, *more: Any) -> Any:
        def inside(boundary: Boundary) -> Any:
            ambush.payload, ambush.cut = data, boundary
            return write(url, data, *more)

        return ambush.meets(f"write {url}", lambda: write(url, data, *more), inside)

    return wrapped


def _deadly_removal(ambush: Ambush, remove: Callable[[str], None]) -> Callable[[str], None]:
    def wrapped(url: str) -> None:
        def inside(boundary: Boundary) -> None:
            objects = storage.ls(url)
            for one in objects[: len(objects) // 2]:
                remove(one)
            ambush.strike(boundary)

        ambush.meets(f"remove {url}", lambda: remove(url), inside)

    return wrapped


def _deadly_end(ambush: Ambush, end_epoch: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(fit: trainer.Fit, seconds: float, beat: trainer.Beat) -> Any:
        def inside(boundary: Boundary) -> None:
            fit._validate(beat)
            ambush.strike(boundary)

        return ambush.meets("end epoch", lambda: end_epoch(fit, seconds, beat), inside)

    return wrapped


def _cut_file(ambush: Ambush, path: str, mode: str) -> IO[Any]:
    class Cut(io.FileIO):
        def write(self, data: Any) -> int:
            if data is ambush.payload:
                super().write(data[: len(data) // 2])
                ambush.strike(ambush.cut)
            return super().write(data)

    return Cut(path, mode) if ambush.payload else open(path, mode)


def _cut_socket(ambush: Ambush, send: Callable[..., Any]) -> Callable[..., Any]:
    """As `send` or `sendmsg`, but for the bytes of the request that holds the payload."""

    def wrapped(self: socket.socket, data: Any, *more: Any) -> Any:
        sent = b"".join(data) if isinstance(data, list | tuple) else bytes(data)
        body = sent.partition(b"\r\n\r\n")[2] if sent.startswith(b"PUT ") else sent
        if ambush.payload and body and ambush.payload.startswith(body[: len(ambush.payload)]):
            self.sendall(sent[: len(sent) - len(body) + len(ambush.payload) // 2])
            ambush.strike(ambush.cut)
        return send(self, data, *more)

    return wrapped
