"""Estimates a training that was never run, from rates that were: `python -m benchmarks.estimate [--set NAME=VALUE …]`.

By default a billion rows on 64 GPUs, with `--neighbours 0` and `--residency mapped`, from a cache on the disks of each
node. Prints as Markdown what is assumed, with its origin, and what follows: bytes, requests, minutes of each stage, and
dollars. `--set epoch_rows_per_gpu=250000` replaces an assumption, for example by a rate that you have measured.
--measure measures the rates of single processes on this machine, and uses them.

No stage overlaps another one in this estimate. Stages that one process does alone are among them, so the table also
shows what more GPUs cannot make faster.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch

from fusion.data.duplicates import vector_labels
from fusion.data.row_store import RowStore
from fusion.training.dataset import TrainingData, statistics

QUESTION = "the question"
PUBLISHED = "the four sources of the published models, in float16"
DEFAULTS = "defaults of the flags"
MEASURED = "`python -m benchmarks.estimate --measure`"
GUESSED = "assumed"
# Name to value, unit, and where it comes from.
ASSUMED: dict[str, tuple[float, str, str]] = {
    "rows": (1e9, "", QUESTION),
    "nodes": (8, "", QUESTION),
    "gpus_per_node": (8, "", QUESTION),
    "numbers": (3971, "per row", PUBLISHED),
    "number_bytes": (2, "bytes", PUBLISHED),
    "sources": (4, "", PUBLISHED),
    "components": (256, "per source", DEFAULTS),
    "epochs": (20, "", DEFAULTS),
    "train_share": (0.8, "of the rows", DEFAULTS),
    "request_bytes": (4 * 2**20, "bytes", "`STREAM_BYTES` in `fusion/data/source_file.py`"),
    "first_rank_us": (5.5, "CPU us per row", "`python -m benchmarks.scale`: read, each added row"),
    "doubling_us": (0.6, "CPU us per row", "growth of that with each doubling, from 1 to 4 million rows"),
    "labels_ns": (3.7, "CPU ns per number", MEASURED),
    "moments_ns": (6.1, "CPU ns per number", MEASURED),
    "sha256_bytes": (1.3e9, "bytes/s per core", MEASURED),
    "order_ns": (72, "CPU ns per row", MEASURED),
    "cores_per_node": (96, "", GUESSED),
    "decode_bytes": (0.25e9, "bytes/s per core", GUESSED),  # `python -m benchmarks.loading` measures it
    "product_flops": (98e9, "FLOP/s per core", GUESSED),  # `python -m benchmarks.speed` measures it
    "store_bytes": (5e9, "bytes/s per node", GUESSED),  # a quarter of a link of 200 Gbit/s
    "disk_bytes": (20e9, "bytes/s per node", GUESSED),  # 8 NVMe disks
    "disk_reads": (4e6, "random reads/s per node", GUESSED),  # 8 NVMe disks with 500,000 each
    "gpu_hour": (3.0, "$", GUESSED),
    "thousand_requests": (0.0004, "$", GUESSED),  # list price of S3
    "epoch_rows_per_gpu": (196_600, "rows/s", "48 steps/s of an H100 with rows in host memory, of 4,096 rows each"),
}


@dataclass(frozen=True)
class Stage:
    """A stage of the training.

    Attributes:
        formula: how its seconds follow from the assumptions, for people.
        bound: what limits it.
    """

    name: str
    seconds: float
    formula: str
    bound: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", type=_replacement, default=[], metavar="NAME=VALUE")
    parser.add_argument("--measure", action="store_true", help="measure the rates of single processes here")
    settings = parser.parse_args()
    given = {name: value for name, (value, _, _) in ASSUMED.items()}
    given |= (measured() if settings.measure else {}) | dict(settings.set)
    print("\n".join([*assumptions(given), "", *results(given)]))


def assumptions(given: dict[str, float]) -> Iterator[str]:
    """Lines of a table with the assumptions of each origin."""
    origins = dict[str, list[str]]()
    for name, (value, unit, origin) in ASSUMED.items():
        shown = origin if given[name] == value else "measured here, or given"
        origins.setdefault(shown, []).append(f"{name} {given[name]:,.4g} {unit}".strip())
    yield "| origin | assumptions |\n|---|---|"
    for origin, shown_values in origins.items():
        yield f"| {origin} | {'; '.join(shown_values)} |"


def results(given: dict[str, float]) -> Iterator[str]:
    found = stages(given)
    n_gpus = given["nodes"] * given["gpus_per_node"]
    seconds = sum(stage.seconds for stage in found)
    requests = given["nodes"] * row_bytes(given) * given["rows"] / given["request_bytes"]
    yield "| stage | minutes | how | bound by |\n|---|---:|---|---|"
    for stage in found:
        yield f"| {stage.name} | {stage.seconds / 60:.0f} | {stage.formula} | {stage.bound} |"
    yield f"| **all** | **{seconds / 60:.0f}** | | |\n"
    dollars = seconds / 3600 * n_gpus * given["gpu_hour"] + requests / 1000 * given["thousand_requests"]
    terabytes = row_bytes(given) * given["rows"] / 1e12
    yield f"Sources: {terabytes:.1f} TB, fetched by each node: {requests / 1e6:.1f} million requests."
    yield f"{seconds / 3600:.1f} hours of {n_gpus:.0f} GPUs and these requests: ${dollars:,.0f}."


def stages(given: dict[str, float]) -> list[Stage]:
    rows, nodes, cores = given["rows"], given["nodes"], given["cores_per_node"]
    stored = row_bytes(given)
    projected = given["sources"] * given["components"] * 4
    us = given["first_rank_us"] + given["doubling_us"] * max(0.0, math.log2(rows / 1e6))
    rate = min(given["store_bytes"], cores * given["decode_bytes"], given["disk_bytes"])
    flops = 2 * given["numbers"] * given["components"]
    products, disk = flops / (cores * given["product_flops"]), (stored + projected) / given["disk_bytes"]
    trained = rows * given["train_share"] * given["epochs"]
    trained_numbers = rows * given["train_share"] * given["numbers"]
    reads, gpus = nodes * given["disk_reads"] / given["sources"], nodes * given["gpus_per_node"]
    epochs = trained / min(reads, gpus * given["epoch_rows_per_gpu"])
    return [
        Stage("table, ids, split", rows * us / 1e6, f"rows x {us:.1f} us", "one process"),
        Stage("reading into the cache", rows * stored / rate, f"{stored:,.0f} bytes per row", "store or cores"),
        Stage("sha256 of all rows", rows * stored / given["sha256_bytes"], "bytes", "one process"),
        Stage("near-duplicates", rows * given["numbers"] * given["labels_ns"] / 1e9, "numbers", "one process"),
        Stage("means and deviations", trained_numbers * given["moments_ns"] / 1e9, "numbers", "every process"),
        Stage("projection", rows * max(products, disk), f"{flops / 1e6:.1f} MFLOP per row", "cores or disks"),
        Stage("order of rows", trained * given["order_ns"] / 1e9, "epochs x trained rows", "every process"),
        Stage("epochs", epochs, "a random read per source and row", "disks or GPUs"),
    ]


def measured(n_rows: int = 60_000, dim: int = 1024, n_ordered: int = 20_000_000) -> dict[str, float]:
    """Rates of what single processes do with all rows, in CPU time on one thread."""
    torch.set_num_threads(1)
    vectors = np.random.default_rng(0).standard_normal((n_rows, dim), dtype=np.float32).astype(np.float16)
    store = RowStore({"": torch.from_numpy(vectors)}, {"": torch.ones(n_rows, dtype=torch.bool)})
    rows, order = cast(TrainingData, SimpleNamespace(store=store, train=torch.arange(n_rows))), torch.arange(n_ordered)
    return {
        "labels_ns": cpu_seconds(lambda: vector_labels(vectors)) / vectors.size * 1e9,
        "moments_ns": cpu_seconds(lambda: statistics(rows, "")) / vectors.size * 1e9,
        "sha256_bytes": vectors.nbytes / cpu_seconds(lambda: store.digest),
        "order_ns": cpu_seconds(lambda: order[torch.randperm(n_ordered)]) / n_ordered * 1e9,
    }


def cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def row_bytes(given: dict[str, float]) -> float:
    return given["numbers"] * given["number_bytes"]


def _replacement(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in ASSUMED:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected NAME=VALUE with one of {', '.join(ASSUMED)}")
    return name, float(value)


if __name__ == "__main__":
    main()
