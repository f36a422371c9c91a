"""Seconds per epoch: `python -m benchmarks.speed [--rows 75000] [--repeats 3] [--json FILE] [--compare BEFORE AFTER]`.

Generates a data set with the published dimensions, below --folder. Trains two epochs on it in new processes: with the
command of `all_embeddings`, once for each of the settings in `SETTINGS`, and with the code that the published models
were trained with, rewritten from its description: torch's DataLoader over rows in memory, float32, one token per
source. The second epoch counts, with its validation. Settings take turns, so that a machine that becomes slower or
faster does not favour one.

Prints for each the median, the lowest and the highest seconds; the multiply-accumulate work per row; the time that the
matrix products of the epoch would take alone at the rate of a large product, measured in the same run (the floor), and
the ratio to it; and how many times faster it is than the published code.

--compare reads two files of --json and says which settings changed, by Welch's t-test of the logarithms at p < 0.01.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import torch

from benchmarks.larger_than_memory import make

PUBLISHED = "published code"
TWO_RANKS = "default, 2 ranks"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = {
    "--recipe published": ["--recipe", "published"],
    "--recipe published --precision bf16": ["--recipe", "published", "--precision", "bf16"],
    "--recipe published --precision bf16 --batch-size 1024": [
        *("--recipe", "published", "--precision", "bf16", "--batch-size", "1024")
    ],
    "default": [],
    "default, --precision bf16": ["--precision", "bf16"],
    "default, --batch-size 1024": ["--batch-size", "1024"],
    "default, 15 members": ["--folds", "5", "--seeds", "3"],
    TWO_RANKS: [],
}
VALIDATING = 0.2  # the default of --val-fraction
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Timed:
    """The epochs of one setting.

    Attributes:
        seconds: of the second epoch, in each repetition.
        mflop: of the matrix products of a forward pass of one row.
        floor: seconds that the matrix products of an epoch take alone.
    """

    seconds: list[float]
    mflop: float
    floor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=75_000, help="rows, of which a fifth validates")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[PUBLISHED, *SETTINGS], default=[PUBLISHED, *SETTINGS])
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--json", help="file to write the seconds to")
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"))
    given = parser.parse_args()
    if given.compare:
        return compare(*(json.loads(Path(file).read_text()) for file in given.compare))
    with tempfile.TemporaryDirectory(prefix="fusion-speed-", dir=given.folder) as folder:
        make(Path(folder), given.rows)
        rates = {"fp32": rate(torch.float32), "bf16": rate(torch.bfloat16)}
        epochs: dict[str, list[tuple[float, float]]] = {name: [] for name in given.only}
        for number in range(given.repeats):
            for name in given.only:
                epochs[name].append(epoch(Path(folder), name, number, given.rows))
    timed = {name: described(name, times, given.rows, rates) for name, times in epochs.items()}
    show(timed, rates)
    if given.json:
        machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        found = {name: asdict(one) for name, one in timed.items()}
        Path(given.json).write_text(json.dumps({**machine, "rows": given.rows, "settings": found}, indent=1))
    return None


def epoch(data: Path, name: str, number: int, n_rows: int) -> tuple[float, float]:
    """Trains two epochs in a new process; returns the seconds of the second, and the MFLOP of a row's forward pass."""
    if name == PUBLISHED:
        command = [sys.executable, "-m", "benchmarks.published", str(data), DEVICE.type]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, mflop = done.stdout.split()[-2:]
        return float(seconds), float(mflop)
    run = ["--output", str(data / "output"), "--run-id", f"r{number}-{list(SETTINGS).index(name)}"]
    flags = ["--data", str(data), *run, "--epochs", "2", "--checkpoint-seconds", "3600", *SETTINGS[name]]
    launch = ["fusion.launch", "--nproc-per-node", "2"] if name == TWO_RANKS else []
    command = [sys.executable, "-m", *launch, "fusion.all_embeddings.train", *flags]
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    rate, mflop = (re.findall(rf"{key}=(\S+)", done.stderr)[-1] for key in ("rows_s", "mflop_per_row"))
    return n_rows * share_that_trains(name) / float(rate), float(mflop)


def share_that_trains(name: str) -> float:
    """The share of the rows that an epoch goes through: with --folds, all of them."""
    return 1.0 if "members" in name else 1 - VALIDATING


def described(name: str, epochs: list[tuple[float, float]], n_rows: int, rates: dict[str, float]) -> Timed:
    mflop = epochs[0][1]
    # The backward pass takes two products for each of the forward pass; rows that validate have a forward pass only.
    # With members of several folds, every row trains some of them, and validates in those that hold it out.
    work = n_rows * mflop * 1e6 * (3 * (1 - VALIDATING) + VALIDATING)
    return Timed([seconds for seconds, _ in epochs], mflop, work / rates["bf16" if "bf16" in name else "fp32"])


def rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product on the device; the best of 50."""
    n_rows, width = (256, 2048) if DEVICE.type == "cpu" else (8192, 8192)
    first, second = (torch.randn(n, width, dtype=dtype, device=DEVICE) for n in (n_rows, width))
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        first @ second
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n_rows * width * width / best


def show(timed: dict[str, Timed], rates: dict[str, float]) -> None:
    found = ", ".join(f"{kind} {value / 1e12:.3g} TFLOP/s" for kind, value in rates.items())
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; large products: {found}\n")
    reference = timed.get(PUBLISHED)
    print(f"{'':<38} s/epoch (lowest-highest)  MFLOP/row  floor, s  x floor  x faster than the published code")
    for name, one in timed.items():
        median = statistics.median(one.seconds)
        faster = f"{statistics.median(reference.seconds) / median:8.2f}" if reference else ""
        spread = f"({min(one.seconds):.2f}-{max(one.seconds):.2f})"
        line = f"{name:<38} {median:7.2f} {spread:<17} {one.mflop:9.1f} {one.floor:9.2f} {median / one.floor:8.2f}"
        print(f"{line} {faster}")


def processor() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", facts.read_text()) if facts.exists() else None
    return found[1] if found else platform.processor()


def compare(before: dict, after: dict) -> None:
    """Prints the ratio of the seconds of each setting that both files have, and whether it could be chance."""
    for name in before["settings"].keys() & after["settings"].keys():
        first, second = (np.log(one["settings"][name]["seconds"]) for one in (before, after))
        chance = scipy.stats.ttest_ind(first, second, equal_var=False).pvalue if min(len(first), len(second)) > 1 else 1
        verdict = "changed" if chance < SIGNIFICANT else "no change that could be told from chance"
        print(f"{name:<38} {np.exp(second.mean() - first.mean()):.3f} times the seconds, p = {chance:.2g}: {verdict}")


if __name__ == "__main__":
    main()
