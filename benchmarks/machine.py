"""What benchmarks of time share: the name of the machine, their JSON files, and the comparison of two such files.

A file has the machine's processor, threads and version of torch, and "settings": a name to the repeated measurements
of it, such as {"default": {"seconds": [1.0, 1.1, 0.9]}}.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # that Fusion computes on by default
SIGNIFICANT = 0.01  # so that one of a hundred comparisons of equal settings says "changed"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --json and --compare."""
    parser.add_argument("--json", help="file to write the measurements to")
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="two files of --json; nothing is run")


def processor() -> str:
    """The name of the GPU, or else of the CPU."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", facts.read_text()) if facts.exists() else None
    return found[1] if found else platform.processor()


def described() -> str:
    """The machine in one line."""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write(file: str, settings: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """Writes the measurements of all settings, and further facts."""
    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    Path(file).write_text(json.dumps({**machine, **facts, "settings": settings}, indent=1))


def compare(files: Sequence[str], measure: str = "seconds") -> None:
    """Prints for each setting of both files the ratio of a measure, and whether it could be chance."""
    before, after = (json.loads(Path(file).read_text())["settings"] for file in files)
    for name in [name for name in before if name in after]:
        first, second = (np.log(one[name][measure]) for one in (before, after))
        if min(len(first), len(second)) == 0:
            continue
        ratio = np.exp(second.mean() - first.mean())
        print(f"{name:<38} {ratio:.3f} times the {measure.replace('_', ' ')}, {_verdict(first, second)}")


def _verdict(first: np.ndarray, second: np.ndarray) -> str:
    """Welch's t-test of the logarithms [n] and [m] of a measure."""
    if min(len(first), len(second)) < 2:
        return "measured once: no verdict"
    chance = scipy.stats.ttest_ind(first, second, equal_var=False).pvalue
    changed = "changed" if chance < SIGNIFICANT else "no change that could be told from chance"
    return f"p = {chance:.2g}: {changed}"
