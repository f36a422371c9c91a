"""MLflow: `--tracker mlflow`, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say.

The run in MLflow has Fusion's run id as its name and as the tag `fusion.run_id`, by which a resumed attempt finds it
and goes on with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from fusion.tracking.protocol import State

EXPERIMENT = "fusion"  # unless MLFLOW_EXPERIMENT_NAME names another
TAG = "fusion.run_id"
MEASURE = "smape"  # of an epoch, it is recorded last: where it is known, so are the others
STATUS: dict[State, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Limits of MLflow's REST interface: parameters per request, and characters of a value.
PARAMETERS, CHARACTERS = 100, 500


class MLflow:
    """Records a run with MLflow's client, which keeps no state outside of this object."""

    def __init__(self) -> None:
        self.client: Any = None
        self.id = ""
        self.recorded = 0  # the last epoch that is recorded
        self.was_finished = False  # an earlier attempt has recorded the end

    def start(self, run_id: str, config: Mapping[str, Any], folder: str) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)
        earlier = self.client.search_runs([experiment], f"tags.`{TAG}` = '{run_id}'", max_results=1)
        if earlier:
            self.id = earlier[0].info.run_id
            known = self.client.get_metric_history(self.id, MEASURE)
            self.recorded = max((metric.step for metric in known), default=0)
            self.was_finished = earlier[0].info.status == STATUS["finished"]
            self.client.update_run(self.id, status="RUNNING")
            return
        tags = {TAG: run_id, "fusion.folder": folder}
        self.id = self.client.create_run(experiment, tags=tags, run_name=run_id).info.run_id
        self._log_settings(config)

    def epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        if number > self.recorded:
            self._log({name: metrics[name] for name in sorted(metrics, key=lambda name: name == MEASURE)}, number)
            self.recorded = number

    def end(self, state: State, summary: Mapping[str, float], report: str) -> None:
        if state == "finished" and not self.was_finished:
            self._log({f"final_{name}": value for name, value in summary.items()}, 0)
            self.client.set_tag(self.id, "fusion.report", report)
        self.client.set_terminated(self.id, STATUS[state])

    def _experiment(self, name: str) -> str:
        known = self.client.get_experiment_by_name(name)
        return str(known.experiment_id if known else self.client.create_experiment(name))

    def _log_settings(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        settings = [Param(name, str(value)[:CHARACTERS]) for name, value in config.items()]
        for start in range(0, len(settings), PARAMETERS):
            self.client.log_batch(self.id, params=settings[start : start + PARAMETERS])

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics in one request, so that an epoch is recorded as a whole or not at all."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [Metric(name, value, now, step) for name, value in metrics.items()])
