"""The commands of k8s/README.md on a real cluster: smoke job, training, evaluation and nightly predictions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from fusion import storage
from fusion.demo.catalog import generate
from fusion.verify.__main__ import main as verify
from tests.cluster.namespace import Namespace
from tests.cluster.store import N_PRODUCTS
from tests.conftest import DIMS, upload

pytestmark = pytest.mark.cluster

CRON = "fusion-predict-nightly"


def test_the_smoke_job_completes(namespace: Namespace) -> None:
    namespace.apply("overlays/cpu-smoke")
    assert namespace.ended("fusion-cpu-smoke") == "Complete"
    assert "event=finished" in namespace.log("job/fusion-cpu-smoke")
    assert storage.exists(f"{namespace.output}/smoke/pointers/runs/all_embeddings/best.json")


def test_training_evaluation_and_nightly_predictions_complete(namespace: Namespace) -> None:
    namespace.configure(FUSION_DATA=f"{namespace.output}/data", FUSION_EPOCHS="10")
    _upload_catalog(namespace)
    namespace.apply("base/train-all-embeddings", {"FUSION_RUN_ID": "r"})
    assert namespace.ended("fusion-train-all-embeddings") == "Complete"
    namespace.apply("base/evaluate-all-embeddings")
    namespace.apply("base/predict-nightly", changes=[{"op": "replace", "path": "/spec/schedule", "value": "* * * * *"}])
    namespace("create", "job", f"--from=cronjob/{CRON}", "predict-now")
    assert namespace.ended("predict-now") == "Complete"
    assert namespace.ended("fusion-evaluate-all-embeddings") == "Complete"
    assert storage.exists(f"{namespace.output}/runs/r/metrics/summary.json")

    first, earlier = _current(namespace), _nights(namespace)
    night = _next_night(namespace, earlier)
    assert "event=published_before" in namespace.log(f"job/{night}")
    assert _current(namespace) == first

    table = f"{namespace.output}/data/test.csv"
    storage.write(table, storage.read(table).rstrip().rpartition(b"\n")[0] + b"\n")  # one product less
    _next_night(namespace, _nights(namespace))
    assert _current(namespace) != first
    assert verify([f"{namespace.output}/pointers/submissions/prices/current.json"]) == 0


def _upload_catalog(namespace: Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), n_products=N_PRODUCTS, dims=DIMS)
        upload(Path(folder), f"{namespace.output}/data")


def _current(namespace: Namespace) -> str:
    return str(json.loads(storage.read(f"{namespace.output}/pointers/submissions/prices/current.json")))


def _nights(namespace: Namespace) -> set[str]:
    """Names of the Jobs that the CronJob has created."""
    owned = {one["metadata"]["name"] for one in namespace.items("jobs") if one["metadata"].get("ownerReferences")}
    return owned - {"predict-now"}


def _next_night(namespace: Namespace, earlier: set[str]) -> str:
    """Waits for the next Job of the CronJob to complete; returns its name."""
    night = str(namespace.until(lambda: min(_nights(namespace) - earlier, default=""), "a Job of the CronJob"))
    assert namespace.ended(night) == "Complete"
    return night
