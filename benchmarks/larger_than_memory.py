"""Trains on more rows than fit in memory: `python -m benchmarks.larger_than_memory [--gb 20] [flags of train]`.

Generates a data set whose vectors have the published dimensions and take --gb gigabytes, below --folder. Trains one
epoch on it with `--residency mapped`, in a control group that allows --memory gigabytes; and one epoch on as many rows
as take a third of that, in memory and without a limit. Prints for both: rows per second of the epoch, the seconds
before it, the peak memory of the process, and that of the control group, which includes the page cache.

It must run as root, because it creates a control group (version 1 or 2). Sources and cache take 1.6 times --gb of disk.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIMS = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}
ROW_BYTES = 4 * sum(DIMS.values())
CHUNK = 8192  # rows generated at a time, and per row group
# Vectors are made of 256 numbers, so that Parquet's dictionaries store each number in one byte.
NUMBERS = np.random.default_rng(0).standard_normal(256).astype(np.float32)
GROUPS = Path("/sys/fs/cgroup")
# The limit and the highest use of a control group, in version 1 and in version 2.
FIRST = (GROUPS / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes")
SECOND = (GROUPS, "memory.max", "memory.peak")

RUN = """
import resource, sys
from fusion.all_embeddings.train import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=20.0, help="gigabytes of vectors")
    parser.add_argument("--memory", type=float, default=4.0, help="gigabytes of memory that the training may use")
    parser.add_argument("--folder", help="where the temporary folder is made, on a local disk")
    given, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="fusion-larger-", dir=given.folder) as folder:
        limit = int(given.memory * 1e9)
        large, small = Path(folder) / "large", Path(folder) / "small"
        make(small, int(limit / 3 / ROW_BYTES))
        resident = train(small, [*flags, "--residency", "host"], None)
        shutil.rmtree(small)
        make(large, int(given.gb * 1e9 / ROW_BYTES))
        mapped = train(large, [*flags, "--cache", str(large / "cache"), "--residency", "mapped"], limit)
        print(f"mapped rows are trained at {mapped / resident:.2f} times the rate of rows in memory")


def train(data: Path, flags: list[str], limit: int | None) -> float:
    """Trains one epoch, prints a line, and returns the rows per second."""
    where = ["--data", str(data), "--output", str(data / "output"), "--run-id", "run", "--epochs", "1"]
    with control_group(limit) as (join, peak_of_group):
        began = time.monotonic()
        command = [sys.executable, "-c", RUN, *where, *flags]
        done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=join)
        seconds, in_group = time.monotonic() - began, peak_of_group()
    if done.returncode:
        sys.exit(f"the training ended with {done.returncode}:\n{done.stderr[-3000:]}")
    n_rows = int(re.findall(r"event=read rows=(\d+)", done.stderr)[0])
    rate, read = (float(re.findall(rf"{name}=(\S+)", done.stderr)[0]) for name in ("rows_s", r"event=read .*seconds"))
    peak = int(done.stdout.split("peak ")[1]) / 1e9
    group = "" if in_group is None else f", of the control group {in_group / 1e9:.2f} GB of {(limit or 0) / 1e9:.2f} GB"
    print(
        f"{' '.join(flags[-2:])}: {n_rows} rows of {n_rows * ROW_BYTES / 1e9:.2f} GB, read in {read:.1f} s, epoch at "
        f"{rate:.0f} rows/s, {seconds:.1f} s in all; peak of the process {peak:.2f} GB{group}",
        flush=True,
    )
    return rate


@contextmanager
def control_group(limit: int | None) -> Iterator[tuple[object, object]]:
    """Makes a control group; gives the function with which a child process joins it, and one that returns its peak."""
    if limit is None:
        yield None, lambda: None
        return
    root, limit_file, peak_file = FIRST if FIRST[0].is_dir() else SECOND
    group = root / f"fusion-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit_file).write_text(str(limit))
        yield (
            lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
            lambda: int((group / peak_file).read_text()),
        )
    finally:
        group.rmdir()


def make(folder: Path, n_rows: int) -> None:
    """Writes train.csv and four sources of `n_rows` rows in the order of their ids."""
    generator, started = np.random.default_rng(n_rows), time.monotonic()
    sources = folder / "embeddings" / "train"
    sources.mkdir(parents=True)
    prices = np.round(generator.lognormal(3, 1, n_rows) + 0.5, 2)
    with open(folder / "train.csv", "w") as file:
        file.write("sample_id,price\n")
        file.writelines(f"{10**9 + row},{price}\n" for row, price in enumerate(prices.tolist()))
    for name, dim in DIMS.items():
        schema = pa.schema([("sample_id", pa.int64()), ("embedding", pa.list_(pa.float32(), dim))])
        with pq.ParquetWriter(sources / f"{name}.parquet", schema, compression="none") as writer:
            for start in range(0, n_rows, CHUNK):
                n = min(CHUNK, n_rows - start)
                values = NUMBERS[np.frombuffer(generator.bytes(n * dim), np.uint8)]
                column = pa.FixedSizeListArray.from_arrays(pa.array(values), dim)
                ids = pa.array(np.arange(10**9 + start, 10**9 + start + n))
                writer.write_batch(pa.record_batch([ids, column], schema=schema), row_group_size=CHUNK)
    print(f"made {n_rows} rows in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
