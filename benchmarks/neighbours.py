"""Seconds to price rows by their neighbours: `python benchmarks/neighbours.py [--rows 75000] [--memory 60000]`.

Makes a model of `all_embeddings` with the published dimensions and a memory of random keys, prices a sample of the rows
in chunks as a prediction does, and prints seconds of its parts for all rows: finding candidates, comparing with them,
and everything, networks included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from fusion.all_embeddings.config import Config
from fusion.all_embeddings.model import build_network
from fusion.nn.batch import Batch
from fusion.nn.neighbours import Memory, bands_of, largest
from fusion.prediction.predict import make_model
from fusion.prediction.resumable import CHUNK

DIMS = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=75_000)
    parser.add_argument("--memory", type=int, default=60_000)
    parser.add_argument("--chunks", type=int, default=4, help=f"of {CHUNK} rows that are timed (default: 4)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = make_model(Config(), build_network, DIMS).to(device).eval()
    components = {role: values.shape[1] for role, values in model.components().items()}
    keys = torch.randn(options.memory, sum(components.values())).div(16).half()
    rows = torch.arange(options.memory)
    memory = Memory(keys, torch.randn(options.memory), torch.zeros_like(rows), rows, bands_of(components)).to(device)
    model.memory = memory
    batch = Batch(
        {role: torch.randn(CHUNK, dim, device=device) for role, dim in DIMS.items()},
        {role: torch.ones(CHUNK, dtype=torch.bool, device=device) for role in DIMS},
    )
    queries, weights = memory.keys[:CHUNK], model.get_buffer("search_weights")
    total = memory._totals(queries, weights)
    found = largest(total, 128)[1]
    parts: dict[str, Callable[[], object]] = {
        "similarity to all": lambda: memory._totals(queries, weights),
        "the largest": lambda: largest(total, 128),
        "bands of candidates": lambda: memory.similarities(queries, found),
        "everything": lambda: model.explained(batch),
    }
    for name, action in parts.items():
        print(f"{name:20} {_seconds(action, options.chunks, device) * options.rows / CHUNK:7.1f} s", flush=True)


def _seconds(action: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one call, after a first one."""
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
