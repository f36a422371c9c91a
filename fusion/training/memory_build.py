"""How the memory of a run is made before its first step: components, keys, and the candidates of every row."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion import log, storage
from fusion.config import RunConfig
from fusion.data.embeddings import stop_if_asked
from fusion.data.row_store import RowStore
from fusion.data.shared_memory import node_tensor
from fusion.distributed.world import World
from fusion.errors import ConfigError
from fusion.loss_functions import SMAPELoss
from fusion.nn import approximate
from fusion.nn.approximate import Partition
from fusion.nn.neighbours import Candidates, CandidateTable, Memory, band_weights, bands_of
from fusion.nn.price_model import PriceModel
from fusion.records import memory
from fusion.records.manifests import MEMORY
from fusion.records.memory import Remembered, log_prices_of
from fusion.records.run import RunFolder
from fusion.training.dataset import TrainingData
from fusion.training.seeds import mixed

CHUNK = 1024  # rows whose neighbours are looked for at a time
SAMPLE = 20_000  # rows that components are made of, at most
ROUNDING = 1e-9  # of float64 sums over that many rows, relative to the largest
WEIGHT_SAMPLE = 4096  # rows that the first weights of the bands are fitted on, at most
WEIGHT_STEPS = 100
WEIGHT_BATCH = 1024
WEIGHT_LR = 0.1


def remember(config: RunConfig, model: PriceModel, data: TrainingData, world: World) -> TrainingData:
    """The data with the candidates of every row; the model gets its components, and the run its `memory.safetensors`.

    A training that goes on uses the components, weights and lists that it began with.
    """
    if not config.components:
        return data
    started, run = time.monotonic(), RunFolder.of(config)
    kept = world.on_main(lambda: _kept(run))
    components = kept.components if kept else world.on_main(lambda: _all_components(model, data))
    model.set_components(components)
    if not config.neighbours:
        return data
    is_large = len(data.train) > config.approximate_above
    if is_large and world.device.type == "cpu":
        world.together(lambda: _check_faiss(config, len(data.train)))
    remembered = _remembered(model, data, components, world)
    trained = remembered.without(config.held_out())
    weights = kept.weights if kept else world.on_main(lambda: first_weights(trained, config, world))
    model.set_search_weights(weights)
    partition = kept.partition if kept else None
    if is_large and kept is None:
        partition = _partition(config, trained, weights, world)
    if kept is None:
        searchable = replace(remembered, partition=partition)
        everything = Remembered(data.all_ids, data.all_prices, searchable, components, weights)
        world.on_main(lambda: storage.write(run.at(MEMORY), memory.to_bytes(everything)))
    table = _table(config, model, replace(trained, partition=partition), world)
    seconds = time.monotonic() - started
    log.info(event="neighbours", rows=len(table.rows), candidates=table.rows.shape[1], seconds=seconds)
    return replace(data, store=replace(data.store, candidates=table))


def _check_faiss(config: RunConfig, n_rows: int) -> None:
    """Before anything that takes long: comparing so many rows with all takes hours, and nobody should find out late.

    Raises:
        ConfigError: faiss is not installed.
    """
    if not approximate.is_installed():
        raise ConfigError(
            f"{n_rows} rows train, more than --approximate-above {config.approximate_above}, and faiss, which finds "
            "neighbours among so many, is not installed",
            f"{approximate.HINT}, or give --approximate-above {n_rows} to compare each row with all",
        )


@dataclass(frozen=True)
class Kept:
    """What a training that goes on reads of its run's memory, with the names of `Remembered` and `Memory`."""

    components: dict[str, np.ndarray]
    weights: np.ndarray
    partition: Partition | None


def _kept(run: RunFolder) -> Kept | None:
    """Of the run's memory, if it has one."""
    if not storage.exists(run.at(MEMORY)):
        return None
    made = run.checkpoints()
    found = memory.read(run, made[-1].manifest.memory_sha256 if made else "")
    return Kept(found.components, found.weights, found.memory.partition)


def _remembered(model: PriceModel, data: TrainingData, components: dict[str, np.ndarray], world: World) -> Memory:
    """All rows with their keys; one without embeddings is nobody's neighbour."""
    folds = torch.where(data.store.any_present(), data.folds, -1)
    keys = _keys(model, data.store, world)
    return Memory(keys, log_prices_of(data.all_prices), folds, data.groups, _bands(components))


def _bands(components: dict[str, np.ndarray]) -> Tensor:
    return bands_of({role: values.shape[1] for role, values in components.items()})


def _all_components(model: PriceModel, data: TrainingData) -> dict[str, np.ndarray]:
    return {role: _components(model, data, role) for role in data.store.dims}


def _components(model: PriceModel, data: TrainingData, role: str) -> np.ndarray:
    """[D, P] the directions in which standardised training rows vary most, scaled so that values are about 1."""
    there = data.train[data.store.present[role][data.train]]
    rows, n_kept = there[:: max(1, -(-len(there) // SAMPLE))], model.get_buffer(f"components_{role}").shape[1]
    covariance = torch.zeros(2 * (data.store.dims[role],), dtype=torch.float64)
    for chunk in torch.split(rows, CHUNK):
        values = model.standardised_role(role, data.store.values[role][chunk].float()).double()
        covariance += values.T @ values
    spread, directions = _largest_directions(covariance / max(1, len(rows)), n_kept)
    scaled: np.ndarray = (directions / spread.clamp_min(0).mean().sqrt().clamp_min(1e-6)).float().numpy()
    return scaled


def _largest_directions(covariance: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """[n] variances, falling, and [D, n] their directions, the same whatever the CPU and the number of threads.

    Of a direction and its opposite the one is taken whose largest number is positive; what is mere rounding is 0.
    """
    spread, directions = torch.linalg.eigh(covariance)
    spread, directions = spread.flip(0)[:n], directions.flip(1)[:, :n]
    directions = directions * torch.take_along_dim(directions, directions.abs().argmax(0, keepdim=True), 0).sign()
    is_noise = (directions.abs() < ROUNDING) | (spread < ROUNDING * spread[0])
    return spread, directions.masked_fill(is_noise, 0.0)


def _keys(model: PriceModel, store: RowStore, world: World) -> Tensor:
    """[N, C] float16 keys of all rows, which the ranks of a node compute in turn and share."""
    n_columns = sum(values.shape[1] for role, values in model.components().items())
    keys = node_tensor((len(store), n_columns), torch.float16, world)
    cpu = torch.device("cpu")

    def fill() -> None:
        for rows in _turns(len(store), world):
            stop_if_asked()
            batch = store.batch(rows, cpu)
            keys[rows] = model.keys(model.inputs(batch.inputs, batch.present))

    with torch.inference_mode():
        world.together(fill)
    return keys


def _turns(n_rows: int, world: World) -> Iterator[Tensor]:
    """Chunks of rows of which this rank computes its node's share; the same chunks for any number of ranks."""
    yield from torch.split(torch.arange(n_rows), CHUNK)[world.local_rank :: world.local_size]


def first_weights(remembered: Memory, config: RunConfig, world: World) -> np.ndarray:
    """[S] weights of the bands that let a sample of rows price each other best, each without its own group.

    They find the candidates; training goes on learning them. Sums are in float64, so that the number of threads does
    not change which candidates are found.
    """
    rows = torch.nonzero(remembered.folds >= 0).squeeze(1)
    rows = rows[:: max(1, -(-len(rows) // WEIGHT_SAMPLE))]
    sample = remembered.of(rows).to(world.device)
    change = torch.zeros(int(remembered.bands.max()) + 1, dtype=torch.float64, device=world.device, requires_grad=True)
    first = band_weights(change.detach())
    found = [
        sample.search(keys, first, config.neighbours, groups)
        for keys, groups in zip(torch.split(sample.keys, CHUNK), torch.split(sample.groups, CHUNK), strict=True)
    ]
    candidates = Candidates.joined(found)
    optimizer, loss = torch.optim.Adam([change], lr=WEIGHT_LR), SMAPELoss()
    generator = torch.Generator().manual_seed(mixed(config.seed, "weights"))
    for _ in range(WEIGHT_STEPS):
        batch = torch.randint(len(rows), (min(WEIGHT_BATCH, len(rows)),), generator=generator).to(world.device)
        some = candidates.of(batch)
        logits = (some.similarities.double() @ band_weights(change)).masked_fill(~some.usable, -1e9)
        price = (logits.softmax(-1) * some.log_prices).sum(-1)
        value = loss(F.softplus(price), F.softplus(sample.log_prices[batch]))
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
    weights: np.ndarray = band_weights(change.detach()).float().cpu().numpy()
    return weights


def _partition(config: RunConfig, trained: Memory, weights: np.ndarray, world: World) -> Partition:
    """Lists of all rows; centroids and codes are fitted on those that train."""
    rows = torch.nonzero(trained.folds >= 0).squeeze(1)
    root, seed = torch.from_numpy(weights).double()[trained.bands].sqrt(), mixed(config.seed, "partition")
    fitted = world.on_main(lambda: [one.numpy() for one in approximate.fitted(trained.keys[rows], root, seed)])
    centroids, codebook = map(torch.from_numpy, fitted)
    lists, there = node_tensor((len(trained),), torch.int32, world), world.device

    def fill() -> None:
        for chunk in _turns(len(trained), world):
            stop_if_asked()
            keys = trained.keys[chunk].to(there).float() * root.float().to(there)
            lists[chunk] = approximate.nearest(keys, centroids.to(there)).int().cpu()

    with torch.inference_mode():
        world.together(fill)
    return Partition(centroids, lists, codebook)


def _table(config: RunConfig, model: PriceModel, remembered: Memory, world: World) -> CandidateTable:
    """The candidates of all rows, never of a row's own group; the ranks of a node find them in turn and share them."""
    n_rows, k = len(remembered), min(config.neighbours, len(remembered))
    weights = model.get_buffer("search_weights")
    rows = node_tensor((n_rows, k), torch.int32, world)
    similarities = node_tensor((n_rows, k, len(weights)), torch.float16, world)
    local = remembered.to(world.device)

    def fill() -> None:
        for chunk in _turns(n_rows, world):
            stop_if_asked()
            mine = chunk.to(world.device)
            found = local.search(local.keys[mine], weights.to(world.device), k, local.groups[mine])
            rows[chunk] = torch.where(found.usable, found.rows, -1).int().cpu()
            similarities[chunk] = found.similarities.half().cpu()

    with torch.inference_mode():
        world.together(fill)
    local = replace(local, partition=None)  # all is found
    return CandidateTable(local, rows, similarities).resident_on(world.device)
