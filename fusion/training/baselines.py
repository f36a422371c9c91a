"""What a model has to beat: the median price and ridge regression on the run's own split, kept in `baselines.json`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fusion import log, storage
from fusion.compare.standard_errors import smape_interval
from fusion.distributed.world import held
from fusion.errors import StopRequested
from fusion.metrics import row_smape
from fusion.nn.batch import Batch
from fusion.nn.price_model import PriceModel
from fusion.prediction.resumable import compute_rows, concatenated
from fusion.records import schemas
from fusion.records.baselines import scores_of
from fusion.records.manifests import BASELINES
from fusion.records.run import RunFolder
from fusion.records.schemas import SCHEMA, BaselineName, Baselines, BaselineScore
from fusion.training import ridge
from fusion.training.ridge import Ridge
from fusion.training.trainer import Fit

# Rows that the regression is fitted to, evenly spaced. With a thousand inputs, 100,000 rows determine its weights to
# about 1% of the error that no weights avoid, so that more rows would only take longer: a second per 20,000 rows on a
# slow CPU.
FITTED_ROWS = 100_000
CHUNK = 4096  # rows at a time: few enough that their inputs are a few MB, enough for fast products
# The sums of all parts are in memory together. Sources of more dimensions than this allows (11,000 together, with one
# part) would also take minutes to solve for, so that the regression is left out.
LARGEST_SUMS = 2 << 30  # bytes
# Rows left out to choose the strength of the penalty: the groups whose hash begins with three zero bits.
HASH_FACTOR, HASH_SHIFT = 0x9E3779B97F4A7C15, 61  # Knuth's multiplicative hashing


def baselines(fit: Fit) -> Baselines | None:
    """Computes the baselines and writes `baselines.json`, unless an earlier attempt at the run has.

    All ranks call this. Whatever goes wrong is a warning, because a training does not need baselines.

    Returns:
        The baselines, on rank 0; None on other ranks, or if something went wrong.
    """
    world, run, started = fit.world, RunFolder.of(fit.config), time.monotonic()
    try:
        found = world.on_main(run.baselines)
        if found is None:
            found = Baselines(SCHEMA, len(fit.data.validation), tuple(_scores(fit)))
            world.on_main(lambda: storage.create(run.at(BASELINES), schemas.seal(asdict(found))))
    except StopRequested:
        raise
    except Exception as error:
        log.warning(event="no_baselines", reason=" ".join(str(error).split())[:200])
        return None
    seconds = time.monotonic() - started
    log.info(event="baselines", median_price=median_price(fit), **scores_of(found), seconds=seconds)
    return found if world.is_main else None


def _scores(fit: Fit) -> list[BaselineScore]:
    """The score of each baseline on the validation rows, on rank 0; an empty list on other ranks."""
    median = median_price(fit)
    found = ridge_predictions(fit, median)
    if not fit.world.is_main:
        return []
    n_rows, prices = len(fit.data.train), np.full(len(fit.data.validation), median)
    scores = [_score(fit, "median price", prices, n_rows)]
    if found is not None:
        scores.append(_score(fit, "ridge regression", found.prices, found.rows, found.alphas))
    return scores


def _score(
    fit: Fit, name: BaselineName, prices: np.ndarray, rows: int, alphas: tuple[float, ...] = ()
) -> BaselineScore:
    groups = fit.data.groups[fit.data.validation].numpy()
    errors = row_smape(fit.data.prices, prices)
    low, high = smape_interval(errors, groups) or (None, None)
    return BaselineScore(name, float(errors.mean()), low, high, rows, alphas)


def median_price(fit: Fit) -> float:
    """The median of the training prices, in dollars."""
    return float(np.expm1(fit.data.targets[fit.data.train].median().item()))


@dataclass(frozen=True)
class Regressed:
    """Prices of the validation rows by ridge regression.

    Attributes:
        prices: [n_validation] dollars.
        alphas: the strength of the penalty, for each part that was left out; one without --folds.
        rows: number of rows that were fitted to.
    """

    prices: np.ndarray
    alphas: tuple[float, ...]
    rows: int


def ridge_predictions(fit: Fit, median: float) -> Regressed | None:
    """Prices of the validation rows by ridge regression, on rank 0; None on other ranks, or if it would take too long.

    With --folds, each row is predicted by a regression that left its fold out. All ranks call this.

    Args:
        median: the price of rows without any embedding, as in a model.
    """
    world, store = fit.world, fit.store
    rows = fit.data.train[:: -(-len(fit.data.train) // FITTED_ROWS)]  # the stride is rounded up
    n_inputs = sum(x.shape[1] for x in fit.model.components().values()) if fit.model.options.components else 0
    n_inputs = (n_inputs or sum(store.dims.values())) + len(store.dims)
    n_parts = 2 * _n_folds(fit)
    if n_parts * (n_inputs + 2) ** 2 * 8 > LARGEST_SUMS:
        log.info(event="no_ridge_regression", reason=f"{n_inputs} inputs would take too long")
        return None

    def sums() -> Tensor:
        return ridge.sums_of(_blocks(fit, store.own(rows)), n_inputs, n_parts).cpu()

    total = world.on_main_alone(sums) if store.nodes is None else store.nodes.summed(sums, world)
    models = world.on_main(lambda: _models(held(total)))
    validation = fit.data.validation
    share = validation[world.share(len(validation))] if store.nodes is None else store.nodes.share(validation, world)
    compute = partial(_prices, fit.model, models, median)
    own = world.together(lambda: compute_rows(compute, store, share, world.device, CHUNK))
    found = concatenated([part for part in world.gather_on_main(own) if part])
    return Regressed(found["price"], tuple(one.alpha for one in models), len(rows)) if found else None


def _n_folds(fit: Fit) -> int:
    """Number of folds that validate in turn: 1 if the validation rows are the same for all members."""
    return len(set(fit.config.held_out()))


def _blocks(fit: Fit, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields inputs, log prices and part of these rows. There are two parts per fold: left out for the penalty or not.

    Near-duplicates are in the same one: otherwise a weak penalty, which fits rows closely, would seem best.
    """
    is_left_out = _are_left_out(fit.data.groups)
    chunks = torch.split(rows, CHUNK)
    for chunk, batch in zip(chunks, fit.store.batches(chunks, fit.world.device), strict=True):
        target = torch.from_numpy(np.log(fit.data.all_prices[chunk.numpy()]))
        folds = fit.data.folds[chunk] if _n_folds(fit) > 1 else torch.zeros_like(chunk)
        parts = 2 * folds + is_left_out[chunk]
        inputs = _inputs(fit.model, batch)
        yield inputs, target.to(inputs.device), parts.to(inputs.device)


def _are_left_out(groups: Tensor) -> Tensor:
    """[N] bool: an eighth of the groups [N]. Groups are numbered in the order of their rows, so numbers are hashed."""
    with np.errstate(over="ignore"):
        hashes = groups.numpy().astype(np.uint64) * np.uint64(HASH_FACTOR) >> np.uint64(HASH_SHIFT)
    return torch.from_numpy(hashes == 0)


def _inputs(model: PriceModel, batch: Batch) -> Tensor:
    """[B, D] what the networks get of each source, zeros where it is missing, and for each source whether it is."""
    found = batch.inputs if batch.is_projected else model.inputs(batch.inputs, batch.present)
    missing = [(~there).float().unsqueeze(1) for there in batch.present.values()]
    return torch.cat([*found.values(), *missing], dim=1)


def _models(sums: Tensor) -> list[Ridge]:
    """The regression for the validation rows of each fold, from the sums of all parts [2 F, …]."""
    kept, left_out = sums[0::2], sums[1::2]
    if len(kept) == 1:
        return [ridge.fit(kept[0], left_out[0])]
    of_all = kept.sum(0), left_out.sum(0)
    return [ridge.fit(of_all[0] - kept[fold], of_all[1] - left_out[fold]) for fold in range(len(kept))]


def _prices(model: PriceModel, models: list[Ridge], median: float, batch: Batch) -> dict[str, Tensor]:
    """ "price" [B] in dollars, within the bounds that the model's own prices have."""
    inputs = _inputs(model, batch)
    logs = torch.stack([one.predict(inputs) for one in models], dim=1)
    folds = torch.zeros(len(logs), 1, dtype=torch.int64) if len(models) == 1 else held(batch.folds).unsqueeze(1)
    prices = logs.gather(1, folds.to(logs.device)).squeeze(1).exp()
    low, high = (model.get_buffer(name) for name in ("lowest_price", "highest_price"))
    known = torch.stack(list(batch.present.values())).any(0)
    return {"price": torch.where(known, prices.clamp(low, high), median)}
