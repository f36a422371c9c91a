"""How good a run is, group by group, on its own validation rows only."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from fusion import log, manifests, report, storage, submission
from fusion.config import EvaluateConfig
from fusion.distributed import world
from fusion.embeddings import load
from fusion.errors import DataError
from fusion.metrics import bootstrap_interval, group_metrics, row_smape
from fusion.parts import compute_parts, discard
from fusion.prediction import BuildNetwork, C, check_dims, load_model, open_run, parts_folder, pricing
from fusion.records import MetricsManifest
from fusion.splits import read_split
from fusion.tables import Table, read_table

BINS = (0, 5, 10, 15, 20, 30, 50, 100, 200, 500, np.inf)
BIN_NAMES = [f"{low:g}-{high:g}" if np.isfinite(high) else f"{low:g}+" for low, high in itertools.pairwise(BINS)]
RANGES = (0, 10, 30, 100, 300, np.inf)
RANGE_NAMES = ["very low", "low", "middle", "high", "very high"]
N_EXTREMES = 20
LARGEST_COLUMN = 200  # values of a --by column; more are no groups


def evaluate_by_groups(settings: EvaluateConfig, config_class: type[C], build_network: BuildNetwork[C]) -> None:
    """Predicts a run's validation rows with its best checkpoint, writes metrics by group and prints them.

    Raises:
        DataError: no such run, a --by column that does not exist, rows of the split that are no longer there.
    """
    with world(settings.device) as place:
        run, config, chosen, data = open_run(settings, config_class, place)
        model = load_model(chosen, config, build_network, place)
        origin = place.on_main(lambda: submission.origin_of(run, chosen, config, data, "train"))
        split = place.on_main(lambda: read_split(run, chosen.manifest.split_sha256))
        table = place.on_main(lambda: _validation_rows(split, data, config.drop_bad_prices, settings.by))
        store = load(data, "train", config.bindings(), table.ids, place, partial=True)
        check_dims(store.dims, model.dims, f"{data}/embeddings/train")
        parts, price = parts_folder(storage.join(run, "parts"), origin, place), pricing(model)
        told = compute_parts(
            lambda *batch: {**price(*batch), **model.explain(*batch)}, store.resident_on(place.device), place, parts
        )
        present = pd.DataFrame({role: there.numpy() for role, there in store.present.items()}, index=table.ids)
        rows = _predictions(table, told["price"], present)
        place.on_main(lambda: _write(run, chosen, evaluate(rows, settings.by, told.get("gate")), rows))
        place.on_main(lambda: discard(parts))


@dataclass(frozen=True)
class Evaluation:
    """What is known about predictions.

    Attributes:
        groups: one row a group: by, group, count, share, smape with its 95% interval, and the other metrics.
        worst, best: the rows with the largest and the smallest error.
        gates: mean gate weight of each expert by price bin; empty for models without a gate.
        distributions: quantiles of true and predicted prices and of the row errors.
    """

    groups: pd.DataFrame
    worst: pd.DataFrame
    best: pd.DataFrame
    gates: pd.DataFrame
    distributions: pd.DataFrame


def evaluate(rows: pd.DataFrame, by: Sequence[str], gate: np.ndarray | None = None) -> Evaluation:
    """Metrics of predicted rows, overall and by group.

    Args:
        rows: columns sample_id, price, predicted, present (which roles were there), and those in `by`.
        gate: [n, E] weight of each expert.
    """
    rows = rows.assign(smape=row_smape(rows["price"], rows["predicted"]))
    groups = [_metrics(part, name, group, len(rows)) for name, group, part in _groups(rows, by)]
    ordered = rows.sort_values(["smape", "sample_id"], ascending=[False, True])
    return Evaluation(
        pd.DataFrame(groups),
        ordered.head(N_EXTREMES),
        ordered.tail(N_EXTREMES).iloc[::-1],
        _gates(rows, gate),
        _distributions(rows),
    )


def price_bins(prices: pd.Series) -> pd.Series:
    """The bin of each price, lower edge inclusive; "outside" for what no bin holds."""
    return _cut(prices, BINS, BIN_NAMES)


def _cut(prices: pd.Series, edges: Sequence[float], names: list[str]) -> pd.Series:
    cut = pd.cut(prices, list(edges), right=False, labels=names)
    return cut.astype("object").where(cut.notna(), "outside")


def _groups(rows: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[str, str, pd.DataFrame]]:
    yield "overall", "all rows", rows
    fixed = [("price_bin", price_bins(rows["price"]), BIN_NAMES)]
    fixed.append(("price_range", _cut(rows["price"], RANGES, RANGE_NAMES), RANGE_NAMES))
    fixed.append(("present", rows["present"], sorted(rows["present"].unique())))
    fixed += [(column, rows[column].astype("str"), _values(rows, column)) for column in by]
    for name, labels, groups in fixed:
        for group in [*groups, *(["outside"] if (labels == "outside").any() and "outside" not in groups else [])]:
            yield name, group, rows[(labels == group).to_numpy()]


def _values(rows: pd.DataFrame, column: str) -> list[str]:
    counts = rows[column].astype("str").value_counts()
    if len(counts) > LARGEST_COLUMN:
        log.warning(event="by_truncated", column=column, values=len(counts), shown=LARGEST_COLUMN)
    return list(counts.index[:LARGEST_COLUMN])


def _metrics(part: pd.DataFrame, name: str, group: str, total: int) -> dict[str, Any]:
    low, high = bootstrap_interval(part["smape"].to_numpy())
    head = {"by": name, "group": group, "count": len(part), "share": len(part) / total}
    metrics = group_metrics(part["price"].to_numpy(), part["predicted"].to_numpy())
    return head | {"smape": metrics.pop("smape"), "smape_low": low, "smape_high": high} | metrics


def _gates(rows: pd.DataFrame, gate: np.ndarray | None) -> pd.DataFrame:
    if gate is None:
        return pd.DataFrame()
    frame = pd.DataFrame(gate, columns=[f"expert_{e}" for e in range(gate.shape[1])])
    by_bin = frame.groupby(price_bins(rows["price"]).to_numpy()).mean()
    order = [name for name in [*BIN_NAMES, "outside"] if name in by_bin.index]
    return pd.concat([frame.mean().to_frame("all rows").T, by_bin.loc[order]])


def _distributions(rows: pd.DataFrame) -> pd.DataFrame:
    quantiles = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0]
    columns = rows.assign(error=rows["predicted"] - rows["price"])[["price", "predicted", "error", "smape"]]
    return columns.quantile(quantiles).rename_axis("quantile").reset_index()


def _validation_rows(split: pd.DataFrame, data: str, drop_bad_prices: bool, by: Sequence[str]) -> Table:
    ids = pd.Index(split.loc[split["side"] == "validation", "sample_id"])
    table = read_table(data, "train", priced=True, drop_bad_prices=drop_bad_prices)
    lost = ids[~ids.isin(table.ids)]
    if len(lost):
        raise DataError(
            f"{len(lost)} validation rows of the run are not in {data}/train.csv, the first: {', '.join(lost[:5])}",
            "evaluate with the data that the run was trained on: --data",
        )
    for column in by:
        if column not in table.frame.columns:
            raise DataError(f"train.csv has no column {column!r}; it has {list(table.frame.columns)}", "correct --by")
    return Table(table.frame.loc[ids], np.arange(len(ids)))


def _predictions(table: Table, prices: np.ndarray, present: pd.DataFrame) -> pd.DataFrame:
    missing = ~present
    names = missing.apply(lambda row: ", ".join(present.columns[row.to_numpy()]), axis=1)
    described = np.where(missing.all(axis=1), "none", np.where(missing.any(axis=1), "without " + names, "all"))
    return table.frame.assign(predicted=prices, present=described).reset_index()


def _write(run: str, chosen: manifests.Checkpoint, evaluation: Evaluation, rows: pd.DataFrame) -> None:
    folder = storage.join(run, "metrics")
    files = {
        "groups.parquet": _parquet(evaluation.groups),
        "predictions.parquet": _parquet(rows[["sample_id", "price", "predicted", "present"]]),
        "groups.csv": evaluation.groups.to_csv(index=False).encode(),
        "summary.json": _summary(run, chosen, evaluation),
    }
    manifest = MetricsManifest(schema=1, files=manifests.entries(files), checkpoint=chosen.name)
    url = storage.join(folder, manifests.MANIFEST)
    is_committed = False
    while not is_committed:  # of two evaluations at once the last one wins, whole
        storage.remove(url)  # who reads while they are replaced sees that they are
        manifests.write_files(folder, files)
        is_committed = storage.create(url, storage.as_json(asdict(manifest)))
    report.show(evaluation.groups, evaluation.worst, evaluation.best, evaluation.gates, evaluation.distributions)
    log.info(event="evaluated", rows=len(rows), written=folder)


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _summary(run: str, chosen: manifests.Checkpoint, evaluation: Evaluation) -> bytes:
    overall = evaluation.groups.iloc[0].drop(["by", "group"]).to_dict()
    columns = ["sample_id", "price", "predicted", "present", "smape"]
    summary: Mapping[str, Any] = {
        "run": storage.base(run),
        "checkpoint": chosen.name,
        "rows": "validation",
        **json.loads(pd.Series(overall).to_json()),
        "worst": _records(evaluation.worst[columns]),
        "best": _records(evaluation.best[columns]),
        "gates": _records(evaluation.gates.rename_axis("price_bin").reset_index()),
        "distributions": _records(evaluation.distributions),
    }
    return storage.as_json(summary)


def _records(frame: pd.DataFrame) -> Any:
    return json.loads(frame.to_json(orient="records"))  # NaN becomes null
