"""Seconds to price rows by their neighbours: `python benchmarks/neighbours.py [--rows 75000] [--memory 60000]`.

Builds a model of `all_embeddings` with the published dimensions and a memory of random keys, and predicts a sample of
the rows in chunks, as `predict_test` does. Prints the seconds for all rows of each step: the search for candidates, the
similarities by band, and a complete prediction with networks.

With `--approximate`, also divides a memory of more than a million rows into lists, on the CPU. Prints how long that
takes, how long a search takes then, and the recall of the candidates of an exact search: unweighted, and weighted by
their weights in the price. `--memory 200000 --rows 100000 --approximate` takes a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.all_embeddings.config import Config
from fusion.all_embeddings.model import build_network
from fusion.distributed.world import join_world
from fusion.nn.batch import Batch
from fusion.nn.neighbours import Memory, bands_of, largest
from fusion.nn.price_model import PriceModel
from fusion.prediction.predict import make_model
from fusion.prediction.resumable import CHUNK
from fusion.training.memory_build import _partition

DIMS = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}
K = 128  # candidates per row; the default of --neighbours
ROWS_PER_CLUSTER = 200  # random keys are clustered; without clusters, no row would have near neighbours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=75_000)
    parser.add_argument("--memory", type=int, default=60_000)
    parser.add_argument("--chunks", type=int, default=4, help=f"of {CHUNK} rows that are timed (default: 4)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--approximate", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = make_model(Config(), build_network, DIMS).to(device).eval()
    made = _clustered({role: values.shape[1] for role, values in model.components().items()}, options.memory + CHUNK)
    memory, queries = made.of(torch.arange(options.memory)).to(device), made.keys[options.memory :].to(device)
    weights = model.get_buffer("search_weights")
    parts = {**_parts(memory, queries, weights), "everything": _pricing(model, memory)}
    for name, action in parts.items():
        print(f"{name:22} {_seconds(action, options.chunks, device) * options.rows / CHUNK:8.1f} s", flush=True)
    if options.approximate:
        _approximate(memory, queries, weights, options)


def _clustered(dims: dict[str, int], n_rows: int) -> Memory:
    n_clusters = -(-n_rows // ROWS_PER_CLUSTER)
    cluster, keys = torch.randint(n_clusters, (n_rows,)), []
    for dim in dims.values():
        centres = torch.randn(n_clusters, dim)
        blocks = torch.split(cluster, 65_536)
        keys.append(
            torch.cat([F.normalize(centres[some] + torch.randn(len(some), dim), dim=1).half() for some in blocks])
        )
    rows = torch.arange(n_rows)
    return Memory(torch.cat(keys, dim=1), torch.randn(n_rows), torch.zeros_like(rows), rows, bands_of(dims))


def _parts(memory: Memory, queries: Tensor, weights: Tensor) -> dict[str, Callable[[], object]]:
    total = memory._totals(queries, weights)
    found = largest(total, K)[1]
    return {
        "similarity to all": lambda: memory._totals(queries, weights),
        "the largest": lambda: largest(total, K),
        "bands of candidates": lambda: memory.similarities(queries, found),
        "all candidates": lambda: memory.search(queries, weights, K),
    }


def _pricing(model: PriceModel, memory: Memory) -> Callable[[], object]:
    model.memory, device = memory, memory.keys.device
    batch = Batch(
        {role: torch.randn(CHUNK, dim, device=device) for role, dim in DIMS.items()},
        {role: torch.ones(CHUNK, dtype=torch.bool, device=device) for role in DIMS},
    )
    return lambda: model.explained(batch)


def _approximate(memory: Memory, queries: Tensor, weights: Tensor, options: argparse.Namespace) -> None:
    started = time.monotonic()
    with join_world("cpu") as world:
        listed = replace(memory, partition=_partition(Config(), memory, weights.numpy(), world))
    print(f"{'lists':22} {time.monotonic() - started:8.1f} s, once for a run", flush=True)
    started = time.monotonic()
    listed.search(queries[:1], weights, K)
    print(f"{'index':22} {time.monotonic() - started:8.1f} s, once for a command", flush=True)
    seconds = _seconds(lambda: listed.search(queries, weights, K), options.chunks, torch.device("cpu"))
    print(f"{'candidates from lists':22} {seconds * options.rows / CHUNK:8.1f} s", flush=True)
    wanted, found = memory.search(queries, weights, K), listed.search(queries, weights, K)
    is_found = (wanted.rows.unsqueeze(2) == found.rows.unsqueeze(1)).any(2).float()
    by_weight = (is_found * (wanted.similarities @ weights).softmax(1)).sum(1).mean()
    print(f"found of {K} candidates: {is_found.mean():.1%}; by weight: {by_weight:.1%}")


def _seconds(action: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds per call, without the first call."""
    with torch.inference_mode():
        action()
        started = time.monotonic()
        for _ in range(times):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.monotonic() - started) / times


if __name__ == "__main__":
    main()
