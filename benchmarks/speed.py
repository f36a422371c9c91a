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
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.larger_than_memory import make

PUBLISHED = "published code"
TWO_RANKS = "default, 2 ranks"
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
    machine.add_flags(parser)
    given = parser.parse_args()
    if given.compare:
        return machine.compare(given.compare)
    with tempfile.TemporaryDirectory(prefix="fusion-speed-", dir=given.folder) as folder:
        make(Path(folder), given.rows)
        rates = {"fp32": rate(torch.float32), "bf16": rate(torch.bfloat16)}
        epochs: dict[str, list[tuple[float, float]]] = {name: [] for name in given.only}
        for number in range(given.repeats):
            for name in given.only:
                epochs[name].append(epoch(Path(folder), name, str(number), given.rows))
                print(f"{name}: {epochs[name][-1][0]:.3f} s", file=sys.stderr)
    timed = {name: described(name, times, given.rows, rates) for name, times in epochs.items()}
    show(timed, rates)
    if given.json:
        machine.write(given.json, {name: asdict(one) for name, one in timed.items()}, rows=given.rows)
    return None


def epoch(data: Path, name: str, tag: str, n_rows: int) -> tuple[float, float]:
    """Trains two epochs in a new process; returns the seconds of the second, and the MFLOP of a row's forward pass.

    Args:
        tag: distinguishes trainings with the same settings.
    """
    if name == PUBLISHED:
        command = [sys.executable, "-m", "benchmarks.published", str(data), machine.DEVICE.type]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, mflop = done.stdout.split()[-2:]
        return float(seconds), float(mflop)
    run = ["--output", str(data / "output"), "--run-id", f"r{tag}-{list(SETTINGS).index(name)}"]
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
    n_rows, width = (256, 2048) if machine.DEVICE.type == "cpu" else (8192, 8192)
    first, second = (torch.randn(n, width, dtype=dtype, device=machine.DEVICE) for n in (n_rows, width))
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        first @ second
        if machine.DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n_rows * width * width / best


def show(timed: dict[str, Timed], rates: dict[str, float]) -> None:
    found = ", ".join(f"{kind} {value / 1e12:.3g} TFLOP/s" for kind, value in rates.items())
    print(f"{machine.described()}; large products: {found}\n")
    reference = timed.get(PUBLISHED)
    print(f"{'':<38} s/epoch (lowest-highest)  MFLOP/row  floor, s  x floor  x faster than the published code")
    for name, one in timed.items():
        median = statistics.median(one.seconds)
        faster = f"{statistics.median(reference.seconds) / median:8.2f}" if reference else ""
        spread = f"({min(one.seconds):.2f}-{max(one.seconds):.2f})"
        line = f"{name:<38} {median:7.2f} {spread:<17} {one.mflop:9.1f} {one.floor:9.2f} {median / one.floor:8.2f}"
        print(f"{line} {faster}")


if __name__ == "__main__":
    main()
