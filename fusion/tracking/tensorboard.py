"""Event files of TensorBoard, as one immutable object per epoch in `<run>/tensorboard/`.

    tensorboard --logdir s3://bucket/output/runs/my-run/tensorboard

TensorBoard reads the files of a folder in the order of their names, and goes on to the next one when it has read one to
its end. So names begin with the epoch, with leading zeros. A resumed run does not write an epoch again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fusion import storage
from fusion.errors import DataError
from fusion.records.run import RunFolder
from fusion.tracking.protocol import State

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoard:
    """Writes the scalars of each epoch, and the settings with the first."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.config: dict[str, Any] = {}
        self.known: set[str] = set()

    def start(self, run_id: str, config: Mapping[str, Any], folder: str) -> None:
        self.config = dict(config)
        self.known = set(map(storage.base, storage.ls(self.run.tensorboard)))
        with suppress(DataError):  # of a first attempt, which finds no such folder
            storage.remove_temporary(self.run.tensorboard)  # TensorBoard would read what a killed attempt has left

    def epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        url = self.run.segment(number)
        if storage.base(url) not in self.known:
            storage.create(url, _segment(number, metrics, self.config if number == 1 else {}))

    def end(self, state: State, summary: Mapping[str, float], report: str) -> None:
        """The figures of the epochs are all that TensorBoard shows."""


def _segment(number: int, metrics: Mapping[str, float], config: Mapping[str, Any]) -> bytes:
    """The bytes of an event file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    with TemporaryDirectory(prefix="fusion-tensorboard-") as folder:
        writer = EventFileWriter(folder)
        try:
            for summary in _summaries(metrics, config):
                writer.add_event(Event(wall_time=time.time(), step=number, summary=summary))
        finally:
            writer.close()
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def _summaries(metrics: Mapping[str, float], config: Mapping[str, Any]) -> Iterator[Summary]:
    from torch.utils.tensorboard import summary

    made: Any = summary  # its functions are not annotated
    if config:
        plain = {name: _plain(value) for name, value in config.items()}
        yield made.text("config", f"```\n{json.dumps(plain, indent=2)}\n```")
        yield from made.hparams(plain, {"smape": None})
    for name, value in metrics.items():
        yield made.scalar(name, value)


def _plain(value: Any) -> bool | int | float | str:
    """The value as TensorBoard's table of settings can hold it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
