"""Builds the memory of a run before its first step.

The memory is what the kernel regression needs of the labelled rows: the principal components of each role, the key of
every row, and, for each row of the training, its candidate neighbours. `fusion.nn.neighbours` explains these terms.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

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
from fusion.training.projection import CHUNK, held_chunks, own_chunks, projected
from fusion.training.seeds import derived_seed

# Principal components are computed from at most this many rows, evenly spaced. More rows take longer; the leading
# components of a role with about a thousand dimensions hardly change.
SAMPLE = 20_000
# Numbers below this, relative to the largest, are rounding errors of float64 sums over so many rows. They are set to 0,
# because they would differ between CPUs.
ROUNDING = 1e-9
# The first weights of the bands only have to be good enough to find candidates; the training then learns the weights.
# A hundred steps of Adam on a sample of this size take seconds.
WEIGHT_SAMPLE = 4096
WEIGHT_STEPS = 100
WEIGHT_BATCH = 1024
WEIGHT_LR = 0.1


def build_memory(config: RunConfig, model: PriceModel, data: TrainingData, world: World) -> TrainingData:
    """Returns the data with the projected inputs and the candidate neighbours of every row.

    Also sets the components and search weights of the model, and writes `memory.safetensors` to the folder of a new
    run. A resumed training reads its components, search weights and inverted lists from that file, so that it finds the
    same neighbours as before.

    Raises:
        ConfigError: an approximate search is needed, and faiss is not installed.
    """
    if not config.components:
        return data
    started, run = time.monotonic(), RunFolder.of(config)
    earlier = world.on_main(lambda: _earlier(run))
    components = earlier.components if earlier else _all_components(model, data, world)
    model.set_components(components)
    inputs = projected(config, model, data.store, world)
    if not config.neighbours:
        return replace(data, inputs=inputs)
    is_large = len(data.train) > config.approximate_above
    if is_large and world.device.type == "cpu":
        world.together(lambda: _check_faiss(config, len(data.train)))
    everything = _memory_of_all_rows(model, data, inputs, components, world)
    trained = everything.without(config.held_out())
    weights = earlier.weights if earlier else world.on_main(lambda: first_weights(trained, config, world))
    model.set_search_weights(weights)
    partition = earlier.partition if earlier else None
    if is_large and earlier is None:
        partition = _partition(config, trained, weights, world)
    if earlier is None:
        searchable = replace(everything, partition=partition)
        document = Remembered(data.all_ids, data.all_prices, searchable, components, weights)
        world.on_main(lambda: storage.write(run.at(MEMORY), memory.to_bytes(document)))
    table = _candidate_table(config, model, replace(trained, partition=partition), world)
    seconds = time.monotonic() - started
    log.info(event="neighbours", rows=len(table.rows), candidates=table.rows.shape[1], seconds=seconds)
    return replace(data, inputs=replace(inputs, candidates=table))


def _check_faiss(config: RunConfig, n_rows: int) -> None:
    """Raises ConfigError if faiss is not installed.

    Without faiss, each row would be compared with all rows, which takes hours for so many. This check comes first, so
    that the job fails at once.
    """
    if not approximate.is_installed():
        raise ConfigError(
            f"{n_rows} rows train, more than --approximate-above {config.approximate_above}, and faiss, which finds "
            "neighbours among so many, is not installed",
            f"{approximate.HINT}, or give --approximate-above {n_rows} to compare each row with all",
        )


@dataclass(frozen=True)
class EarlierMemory:
    """What a resumed training reuses of the memory that an earlier attempt wrote; names as in `Remembered`."""

    components: dict[str, np.ndarray]
    weights: np.ndarray
    partition: Partition | None


def _earlier(run: RunFolder) -> EarlierMemory | None:
    """Reads the memory that an earlier attempt at the run wrote; None if there is none."""
    if not storage.exists(run.at(MEMORY)):
        return None
    made = run.checkpoints()
    found = memory.read(run, made[-1].manifest.memory_sha256 if made else "")
    return EarlierMemory(found.components, found.weights, found.memory.partition)


def _memory_of_all_rows(
    model: PriceModel, data: TrainingData, inputs: RowStore, components: dict[str, np.ndarray], world: World
) -> Memory:
    """Returns a memory of all rows with their keys, including those that validate."""
    # A row without any embedding gets part -1, so that no search returns it.
    folds = torch.where(data.store.any_present(), data.folds, -1)
    keys = _keys(model, inputs, world)
    return Memory(keys, log_prices_of(data.all_prices), folds, data.groups, _bands(components))


def _bands(components: dict[str, np.ndarray]) -> Tensor:
    return bands_of({role: values.shape[1] for role, values in components.items()})


def _all_components(model: PriceModel, data: TrainingData, world: World) -> dict[str, np.ndarray]:
    """Returns the principal components [D, P] of each role, on every rank."""
    nodes, roles = data.store.nodes, data.store.dims
    if nodes is None:
        return world.on_main(
            lambda: {role: _components(model, data, role, _products(model, data, role)) for role in roles}
        )
    summed = {role: nodes.summed(partial(_products, model, data, role), world) for role in roles}
    return world.on_main(lambda: {role: _components(model, data, role, summed[role]) for role in roles})


def _sample(data: TrainingData, role: str) -> Tensor:
    """Positions of the training rows, at most `SAMPLE`, from which the components of a role are computed."""
    present = data.train[data.store.present[role][data.train]]
    return present[:: _stride(len(present), SAMPLE)]


def _products(model: PriceModel, data: TrainingData, role: str) -> Tensor:
    """Returns the sum of the products of each two dimensions, [D, D], over the sampled rows that this node holds."""
    products = torch.zeros(2 * (data.store.dims[role],), dtype=torch.float64)
    for chunk in torch.split(data.store.own(_sample(data, role)), CHUNK):
        values = model.standardised_role(role, data.store.held(role, chunk).float()).double()
        products += values.T @ values
    return products


def _components(model: PriceModel, data: TrainingData, role: str, products: Tensor) -> np.ndarray:
    """Returns the first P principal components [D, P] of the standardised training rows of a role.

    They are scaled such that the projections have a root mean square of 1.
    """
    n_rows, n_components = len(_sample(data, role)), model.get_buffer(f"components_{role}").shape[1]
    variances, directions = _largest_directions(products / max(1, n_rows), n_components)
    deviation = variances.clamp_min(0).mean().sqrt().clamp_min(1e-6)  # not 0, even if all rows are equal
    scaled: np.ndarray = (directions / deviation).float().numpy()
    return scaled


def _stride(n_rows: int, most: int) -> int:
    """Returns the step with which a slice takes at most `most` of `n_rows` rows, evenly spaced."""
    return max(1, -(-n_rows // most))


def _largest_directions(covariance: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Returns the n largest eigenvalues [n], falling, and their eigenvectors [D, n].

    The result does not depend on the CPU or the number of threads: the sign of each eigenvector is chosen such that its
    largest entry is positive, and entries that are only rounding errors are set to 0.
    """
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:n], directions.flip(1)[:, :n]
    largest = torch.take_along_dim(directions, directions.abs().argmax(0, keepdim=True), 0)
    directions = directions * largest.sign()
    is_rounding = (directions.abs() < ROUNDING) | (variances < ROUNDING * variances[0])
    return variances, directions.masked_fill(is_rounding, 0.0)


def _keys(model: PriceModel, inputs: RowStore, world: World) -> Tensor:
    """Returns the keys of all rows, [N, C] float16, in memory that the ranks of a node share.

    The ranks of a node compute together the keys of all rows that it holds, and nodes send them to one another.
    """
    n_columns = sum(values.shape[1] for role, values in model.components().items())
    keys = node_tensor((len(inputs), n_columns), torch.float16, world)
    cpu = torch.device("cpu")

    def fill() -> None:
        for rows in held_chunks(inputs, world):
            stop_if_asked()
            keys[rows] = model.keys(inputs.batch(rows, cpu).inputs)

    with torch.inference_mode():
        world.together(fill)
        if inputs.nodes is not None:
            inputs.nodes.complete(keys, world)
    return keys


def first_weights(remembered: Memory, config: RunConfig, world: World) -> np.ndarray:
    """Returns the weights of the bands, [S], with which candidates are searched and with which the training starts.

    They minimise the SMAPE of a kernel regression on a sample of rows, in which each row is priced by the other rows of
    the sample, except its near-duplicates. The optimisation is in float64, because float32 rounding depends on the
    number of threads and would change which candidates are found.
    """
    rows = torch.nonzero(remembered.folds >= 0).squeeze(1)
    rows = rows[:: _stride(len(rows), WEIGHT_SAMPLE)]
    sample = remembered.of(rows).to(world.device)
    change = torch.zeros(int(remembered.bands.max()) + 1, dtype=torch.float64, device=world.device, requires_grad=True)
    first = band_weights(change.detach())
    found = [
        sample.search(keys, first, config.neighbours, groups)
        for keys, groups in zip(torch.split(sample.keys, CHUNK), torch.split(sample.groups, CHUNK), strict=True)
    ]
    candidates = Candidates.joined(found)
    optimizer, loss = torch.optim.Adam([change], lr=WEIGHT_LR), SMAPELoss()
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "weights"))
    for _ in range(WEIGHT_STEPS):
        batch = torch.randint(len(rows), (min(WEIGHT_BATCH, len(rows)),), generator=generator).to(world.device)
        some = candidates.of(batch)
        scores = some.similarities.double() @ band_weights(change)
        logits = scores.masked_fill(~some.usable, -1e9)  # weight 0; -inf would give NaN if no candidate is usable
        price = (logits.softmax(-1) * some.log_prices).sum(-1)
        value = loss(F.softplus(price), F.softplus(sample.log_prices[batch]))
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
    weights: np.ndarray = band_weights(change.detach()).float().cpu().numpy()
    return weights


def _partition(config: RunConfig, trained: Memory, weights: np.ndarray, world: World) -> Partition:
    """Returns the inverted lists of the approximate search, for all rows.

    The centroids and the codebook are fitted on the training rows; every other row goes to its nearest centroid.
    """
    rows = torch.nonzero(trained.folds >= 0).squeeze(1)
    # Both keys of a dot product are scaled by the root of the weights, so that it equals the weighted similarity.
    root = torch.from_numpy(weights).double()[trained.bands].sqrt()
    seed = derived_seed(config.seed, "partition")
    fitted = world.on_main(lambda: [one.numpy() for one in approximate.fitted(trained.keys[rows], root, seed)])
    centroids, codebook = map(torch.from_numpy, fitted)
    lists, device = node_tensor((len(trained),), torch.int32, world), world.device

    def fill() -> None:
        for chunk in own_chunks(len(trained), world):
            stop_if_asked()
            keys = trained.keys[chunk].to(device).float() * root.float().to(device)
            lists[chunk] = approximate.nearest(keys, centroids.to(device)).int().cpu()

    with torch.inference_mode():
        world.together(fill)
    return Partition(centroids, lists, codebook)


def _candidate_table(config: RunConfig, model: PriceModel, remembered: Memory, world: World) -> CandidateTable:
    """Returns the candidate neighbours of all rows, without those of a row's own group of near-duplicates.

    The ranks of a node search together and share the result.
    """
    n_rows, k = len(remembered), min(config.neighbours, len(remembered))
    weights = model.get_buffer("search_weights")
    rows = node_tensor((n_rows, k), torch.int32, world)
    similarities = node_tensor((n_rows, k, len(weights)), torch.float16, world)
    local = remembered.to(world.device)

    def fill() -> None:
        for chunk in own_chunks(n_rows, world):
            stop_if_asked()
            mine = chunk.to(world.device)
            found = local.search(local.keys[mine], weights.to(world.device), k, local.groups[mine])
            rows[chunk] = torch.where(found.usable, found.rows, -1).int().cpu()
            similarities[chunk] = found.similarities.half().cpu()

    with torch.inference_mode():
        world.together(fill)
    local = replace(local, partition=None)  # frees the inverted lists: nothing is searched after this
    return CandidateTable(local, rows, similarities).resident_on(world.device)
