"""Prices for rows, and the submission made of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fusion import checkpoint, log, manifests, storage
from fusion.config import PredictConfig, ReadRunConfig, RunConfig
from fusion.distributed import World, world
from fusion.embeddings import RowStore, load
from fusion.errors import DataError, DivergedError
from fusion.layers import MIN_PRICE, PriceModel, to_price
from fusion.metrics import bootstrap_interval, row_smape
from fusion.runs import find_run, move_pointer, read_config
from fusion.tables import Table, read_table

C = TypeVar("C", bound=RunConfig)
BuildNetwork = Callable[[C, Mapping[str, int]], nn.Module]

CHUNK = 1024  # rows a forward pass


def predict_rows(model: nn.Module, store: RowStore, rows: Tensor, place: World) -> np.ndarray:
    """Prices [n] in dollars, float64, of the store's rows [n], in their order: each computed once over all ranks."""
    part = [to_price(model(*batch)).cpu().numpy() for batch in _chunks(model, store, rows, place)]
    return place.gather(np.concatenate([np.empty(0), *part]))


def explain_rows(model: PriceModel, store: RowStore, rows: Tensor, place: World) -> dict[str, np.ndarray]:
    """What the network tells of its inner choices, name to [n, …], such as the gate's weights."""
    parts = [model.explain(*batch) for batch in _chunks(model, store, rows, place)]
    names = place.on_main(lambda: list(parts[0]) if parts else [])
    told = {name: [part[name].float().cpu().numpy() for part in parts] for name in names}
    return {name: np.concatenate([part for parts in place.exchange(told[name]) for part in parts]) for name in names}


def _chunks(
    model: nn.Module, store: RowStore, rows: Tensor, place: World
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    model.eval()
    with torch.inference_mode():
        for chunk in torch.split(rows[place.share(len(rows))], CHUNK):
            if len(chunk):
                yield store.batch(chunk, place.device)


def open_run(settings: ReadRunConfig, config_class: type[C], place: World) -> tuple[str, C, str]:
    """URL of the run to use, its settings, and where its data are; from here on the log carries its name."""
    run = place.on_main(lambda: find_run(settings, config_class.variant))
    config = place.on_main(lambda: read_config(run, config_class))
    log.configure(run.rsplit("/", 1)[-1], place.rank, place.size)
    return run, config, settings.data or config.data


def load_best(
    run: str, config: C, build_network: BuildNetwork[C], place: World
) -> tuple[PriceModel, manifests.Checkpoint]:
    """The model of the run's best checkpoint, verified, on this rank's device."""
    chosen, (tensors, dims) = place.on_main(lambda: _read(manifests.best(run)))
    model = PriceModel(build_network(config, dims), dims, config.modality_dropout)
    model.load_state_dict(tensors)
    return model.to(place.device), chosen


def _read(chosen: manifests.Checkpoint) -> tuple[manifests.Checkpoint, tuple[dict[str, Tensor], dict[str, int]]]:
    return chosen, checkpoint.read_model(chosen)


def check_dims(found: Mapping[str, int], trained: Mapping[str, int], where: str) -> None:
    """Raises a DataError that names both when the data's dimensions are not the model's."""
    wrong = {role: (found[role], dim) for role, dim in trained.items() if found[role] != dim}
    for role, (dim, expected) in wrong.items():
        raise DataError(
            f"{role} has {dim} dimensions in {where}, the model was trained with {expected}",
            "use embeddings of the encoder it was trained with, or train again",
        )


def predict_test(settings: PredictConfig, config_class: type[C], build_network: BuildNetwork[C]) -> None:
    """Predicts `test.csv` with a run's best checkpoint and publishes the submission.

    Raises:
        DataError: no such run, bad input, or dimensions other than the model's.
    """
    with world(settings.device) as place:
        run, config, data = open_run(settings, config_class, place)
        model, chosen = load_best(run, config, build_network, place)
        table = place.on_main(lambda: read_table(data, "test", priced=False))
        store = load(data, "test", config.bindings(), table.ids, place, max_missing=config.max_missing)
        check_dims(store.dims, model.dims, f"{data}/embeddings/test")
        prices = predict_rows(model, store.resident_on(place.device), torch.arange(len(table)), place)
        place.on_main(lambda: _publish(settings, run, chosen, table, prices))


def _publish(settings: PredictConfig, run: str, chosen: manifests.Checkpoint, table: Table, prices: np.ndarray) -> None:
    warn_of_leak(table, prices, chosen)
    content = submission_csv(list(table.ids[table.file_order]), prices[table.file_order])
    date = settings.date or datetime.now(UTC).strftime("%Y-%m-%d")
    key = f"{settings.name}/{date}/{storage.sha256(content)[:12]}"
    folder = storage.join(settings.output, "submissions", key)
    if not storage.exists(storage.join(folder, manifests.MANIFEST)):
        files = manifests.write_files(folder, {"submission.csv": content})
        model = next(entry for entry in chosen.manifest["files"] if entry["key"] == manifests.MODEL)
        facts = {"schema": 1, "rows": len(table), "date": date, "run": run, "checkpoint": chosen.name}
        manifest = storage.as_json(facts | {"model_sha256": model["sha256"], "files": files})
        storage.create(storage.join(folder, manifests.MANIFEST), manifest)
    move_pointer(settings.output, "submissions", settings.name, "current", target={"submission": key})
    log.info(event="published", rows=len(table), submission=storage.join(folder, "submission.csv"))


def submission_csv(ids: list[str], prices: np.ndarray) -> bytes:
    """`sample_id,price` in the given order, prices in dollars to a hundredth of a cent.

    Raises:
        DivergedError: never for prices of a `PriceModel`; for any that is not finite, or below a cent.
    """
    if not (np.isfinite(prices) & (prices >= MIN_PRICE)).all():
        raise DivergedError("a predicted price is not a finite number of at least a cent", "train the model again")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["sample_id", "price"])
    writer.writerows((sample_id, f"{price:.4f}") for sample_id, price in zip(ids, prices, strict=True))
    return buffer.getvalue().encode()


def warn_of_leak(table: Table, prices: np.ndarray, chosen: manifests.Checkpoint) -> None:
    """Warns when test rows that have prices are predicted far worse than validation promised.

    Embeddings whose encoder was tuned on training prices do that: the validation rows are no news to the encoder.
    """
    if "price" not in table.frame.columns:
        return
    truth = pd.to_numeric(table.frame["price"], errors="coerce").to_numpy(np.float64)
    priced = np.isfinite(truth) & (truth > 0)
    if not priced.any():
        return
    errors = row_smape(truth[priced], prices[priced])
    low, high = bootstrap_interval(errors)
    smape = float(chosen.manifest["smape"])
    log.info(event="test_prices", rows=int(priced.sum()), smape=float(errors.mean()), low=low, high=high)
    if low > smape * 1.1:
        log.warning(
            event="validation_too_good",
            validation_smape=smape,
            test_smape=float(errors.mean()),
            cause="an encoder that was tuned on training prices, or other prices in test",
        )
