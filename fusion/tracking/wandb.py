"""Weights & Biases: `--tracker wandb`, in the project that WANDB_PROJECT names, by default fusion.

Fusion's run id is the id in W&B too, so that a resumed attempt goes on with the same run there. W&B keeps a run's id
even after its run was deleted there: then give the training another --run-id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fusion.tracking.protocol import State


class WandB:
    """Records a run with the `wandb` package."""

    def __init__(self) -> None:
        self.run: Any = None
        self.recorded = 0  # the last epoch that is recorded

    def start(self, run_id: str, config: Mapping[str, Any], folder: str) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT") or "fusion"
        settings = {**config, "folder": folder}
        self.run = wandb.init(project=project, id=run_id, name=run_id, resume="allow", config=settings)
        # W&B accepts only ascending steps. After a resume, `step` is the one after the last that it has.
        self.recorded = max(0, int(self.run.step) - 1)

    def epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        if number > self.recorded:
            self.run.log(dict(metrics), step=number)
            self.recorded = number

    def end(self, state: State, summary: Mapping[str, float], report: str) -> None:
        if state == "finished":
            self.run.summary.update({f"final_{name}": value for name, value in summary.items()} | {"report": report})
        self.run.finish(exit_code=0 if state == "finished" else 1)
