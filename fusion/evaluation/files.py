"""Writes an evaluation into the run's `metrics/`: groups, predictions of the rows, and a summary."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from fusion import log, storage
from fusion.evaluation.groups import Evaluation
from fusion.records import manifests
from fusion.records.contention import turns
from fusion.records.run import RunFolder
from fusion.records.schemas import SCHEMA, MetricsManifest, seal
from fusion.submissions.predictions import COMPARABLES

# Characters of a text that `summary.json` has of each extreme row: enough for a title and the begin of a description.
LONGEST_TEXT = 1000


def write(
    run: RunFolder, chosen: manifests.Checkpoint, evaluation: Evaluation, rows: pd.DataFrame, columns: pd.DataFrame
) -> None:
    """Writes the metrics, the predictions of the rows and a summary to the run's `metrics/`.

    Args:
        columns: the user's columns of extreme rows and of their comparable products, by sample_id.
    """
    folder = run.metrics
    files = {
        "groups.parquet": _parquet(evaluation.groups),
        "predictions.parquet": _parquet(rows),
        "groups.csv": evaluation.groups.to_csv(index=False).encode(),
        "summary.json": _summary(run, chosen, evaluation, columns),
    }
    data, model = chosen.manifest.data_sha256, chosen.model_sha256
    manifest = MetricsManifest(SCHEMA, manifests.entries(files), chosen.name, run.run_id, model, data)
    _replace(folder, files, seal(asdict(manifest)))
    log.info(event="evaluated", rows=len(rows), written=folder)


def _replace(folder: manifests.Folder, files: Mapping[str, bytes], manifest: bytes) -> None:
    """Replaces the files of an earlier evaluation, and their manifest.

    If two evaluations write at the same time, the files of the last one remain, and match their manifest.
    """
    url = folder.manifest_url
    for _ in turns(url):
        storage.remove(url)  # without a manifest, readers know that the files are being replaced
        manifests.write_files(folder, files)
        if storage.create(url, manifest):
            return


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _summary(
    run: RunFolder, chosen: manifests.Checkpoint, evaluation: Evaluation, texts: pd.DataFrame | None = None
) -> bytes:
    """Returns the content of `summary.json`: overall metrics, extreme rows, gates, quantiles and coverage."""
    overall = evaluation.groups.iloc[0].drop(["by", "group"]).to_dict()
    columns = ["sample_id", "price", "predicted", "present", "smape"]
    compared = [COMPARABLES[0]] if COMPARABLES[0] in evaluation.worst and texts is not None else []
    summary: Mapping[str, Any] = {
        "run": run.run_id,
        "checkpoint": chosen.name,
        "rows": "validation",
        "as_trained": evaluation.as_trained,
        **json.loads(pd.Series(overall).to_json()),
        "baselines": [] if evaluation.baselines is None else [asdict(one) for one in evaluation.baselines.scores],
        "worst": _described(evaluation.worst[[*columns, *compared]], texts),
        "best": _described(evaluation.best[columns], texts),
        "gates": _records(evaluation.gates.rename_axis("price_bin").reset_index()),
        "distributions": _records(evaluation.distributions),
        "intervals": _records(evaluation.coverage),
    }
    return storage.as_json(summary)


def _described(extremes: pd.DataFrame, texts: pd.DataFrame | None) -> list[dict[str, Any]]:
    """The rows as records, with the user's columns of each under "columns", and of its comparable products."""
    found: list[dict[str, Any]] = _records(extremes)
    if texts is None:
        return found
    for record in found:
        record["columns"] = _texts(texts, record["sample_id"])
        if COMPARABLES[0] in record:
            record["comparables"] = {one: _texts(texts, one) for one in record.pop(COMPARABLES[0])}
    return found


def _texts(texts: pd.DataFrame, sample_id: str) -> dict[str, str]:
    """Returns name to text of the user's columns of a row that are not missing; nothing for an unknown row."""
    if sample_id not in texts.index:
        return {}
    row = texts.loc[sample_id]
    return {str(name): str(value)[:LONGEST_TEXT] for name, value in row.items() if pd.notna(value)}


def _records(frame: pd.DataFrame) -> Any:
    return json.loads(frame.to_json(orient="records"))  # NaN becomes null
