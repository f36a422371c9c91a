"""What a tracker has to have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

State = Literal["finished", "stopped", "failed"]  # how an attempt ended; one that was killed does not say


class Tracker(Protocol):
    """Follows one run. It may be stopped or killed at any moment; the next attempt at the run makes another tracker.

    Each attempt reports all epochs of the run again, from the first: a tracker passes over those that it has recorded.
    Epochs have the same figures each time.
    """

    def start(self, run_id: str, config: Mapping[str, Any], folder: str) -> None:
        """Called once, before the first epoch.

        Args:
            run_id: identifies the run, and stays the same if it is resumed.
            config: the settings, with sections as dotted keys such as `sources.clip_image`.
            folder: URL of the run's folder.
        """

    def epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        """Called after each epoch, numbered from 1, with its loss, smape (in %), lr, step and perhaps rows_s."""

    def end(self, state: State, summary: Mapping[str, float], report: str) -> None:
        """Called at the end of the attempt.

        Args:
            summary: SMAPE of the weights that are kept and, if known, of the baselines, in %.
            report: URL of the run's report, which exists once the run has finished.
        """
