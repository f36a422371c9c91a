"""Out-of-fold predictions of Fusion's own runs: what each said of its own validation rows."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.quality.catalog import Catalog
from benchmarks.quality.predictions import Prediction
from fusion import manifests, storage
from fusion.config import HOW, digest
from fusion.errors import DataError
from fusion.tables import places_of

VALIDATION = "validation.parquet"  # in a checkpoint
EVALUATED = "metrics/predictions.parquet"  # of evaluate_by_groups
COLUMNS = ["sample_id", "price", "predicted"]


def read_runs(urls: Sequence[str], catalog: Catalog) -> list[Prediction]:
    """One prediction for all runs with the same settings but for --fold, such as the five of `--folds 5`.

    Raises:
        DataError: a run without predictions, of other rows or prices, or two runs of the same settings that validate on
            the same rows.
    """
    together: dict[str, list[str]] = {}
    for url in urls:
        together.setdefault(_settings(url), []).append(url)
    return [_joined(runs, catalog) for runs in together.values()]


def _settings(run: str) -> str:
    config = _json(storage.join(run, "config.json"))
    kept = {key: value for key, value in config.items() if key not in HOW | {"fold", "data"}}
    return digest(kept)


def _joined(runs: Sequence[str], catalog: Catalog) -> Prediction:
    logs = np.full(len(catalog.ids), np.nan)
    for run in runs:
        places, predicted = _of_run(run, catalog)
        if not np.isnan(logs[places]).all():
            raise DataError(
                f"{run} predicts rows that another run of the same settings predicts as well",
                "name each run, and each fold, once in --runs",
            )
        logs[places] = predicted
    return Prediction(_name(runs), "Fusion", logs, is_ours=True)


def _name(runs: Sequence[str]) -> str:
    names = [storage.base(run.rstrip("/")) for run in runs]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _of_run(run: str, catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the catalog, and their log prices as predicted."""
    frame = _predictions(run)
    places = places_of(pd.Index(frame["sample_id"].astype("str")), catalog.ids)
    if (places < 0).any() or len(np.unique(places)) < len(places):
        n_unknown = int((places < 0).sum())
        raise DataError(
            f"{run} predicts {len(places)} rows, of which {n_unknown} are not in train.csv; each must be there once",
            "name the data that the run was trained on with --data",
        )
    prices, predicted = (frame[name].to_numpy(np.float64) for name in ("price", "predicted"))
    n_other = int((~np.isclose(prices, catalog.prices[places], rtol=1e-6)).sum())
    if n_other:
        raise DataError(
            f"{run} was trained with other prices for {n_other} of {len(places)} rows",
            "name the data that the run was trained on with --data",
        )
    return places, np.log(predicted)


def _predictions(run: str) -> pd.DataFrame:
    """sample_id, price and predicted of the validation rows, from the best checkpoint or else the evaluation."""
    best = manifests.best(run)
    if best.manifest.sha256_of(VALIDATION):
        return _parquet(manifests.read_file(best, VALIDATION), storage.join(best.url, VALIDATION))
    url = storage.join(run, EVALUATED)
    content = storage.read_if_exists(url)
    if content is None:
        variant = _json(storage.join(run, "run.json")).get("variant", "qwen_clip")
        raise DataError(
            f"{run} has neither {VALIDATION} in its best checkpoint nor {EVALUATED}",
            f"python -m fusion.{variant}.evaluate_by_groups --run-dir {run}",
        )
    return _parquet(content, url)


def _parquet(content: bytes, url: str) -> pd.DataFrame:
    remedy = "evaluate the run again"
    try:
        frame = pd.read_parquet(io.BytesIO(content))
    except (ValueError, OSError) as error:
        raise DataError(f"{url} is damaged: {str(error).splitlines()[0]}", remedy) from error
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise DataError(f"{url} has no column {missing[0]}; it has {', '.join(map(str, frame))}", remedy)
    return frame[COLUMNS]


def _json(url: str) -> Any:
    content = storage.read_if_exists(url)
    if content is None:
        raise DataError(f"there is no {url}", "name the folder of a run, such as OUTPUT/runs/RUN_ID")
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{url} is not JSON", "restore it, or name another run") from error
