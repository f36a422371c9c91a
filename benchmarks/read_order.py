"""Reads an epoch's rows from a file larger than the memory: `python -m benchmarks.read_order [--gb 3] [--memory 0.5]`.

Writes rows of 4 KiB, as of one published source, to a file below --folder. For each value of --shuffle, reads the first
--rows rows of an epoch's order in batches of 256, as `--residency mapped` does, without a training step between them.
Each reads in a process of its own, in a control group that allows --memory gigabytes, and begins without any of the
file in memory. Prints for each: rows per second, reads and bytes of the disk per 1,000 rows, and bytes per read. It
must run as root, because it creates a control group (version 1 or 2), while nothing else reads from that disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.larger_than_memory import control_group
from fusion.data.mapped_file import MappedFile
from fusion.data.row_store import RowStore
from fusion.training.order import batches_read_together, epoch_order

DIM = 1024
ROW_BYTES = 4 * DIM
BATCH = 256
SECTOR = 512  # bytes; the unit of the kernel's statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.0, help="gigabytes of rows")
    parser.add_argument("--memory", type=float, default=0.5, help="gigabytes of memory that the reader may use")
    parser.add_argument("--rows", type=int, default=100_000, help="rows to read")
    parser.add_argument("--folder", help="where the temporary folder is made, on a local disk")
    parser.add_argument("--read", help=argparse.SUPPRESS)  # the child process: the order to read in
    given = parser.parse_args()
    if given.read:
        read(Path(given.folder, "rows"), given.read, given.rows)
        return
    with tempfile.TemporaryDirectory(prefix="fusion-order-", dir=given.folder) as folder:
        make(Path(folder, "rows"), int(given.gb * 1e9 / ROW_BYTES))
        for shuffle in ("rows", "blocks"):
            command = [sys.executable, "-m", "benchmarks.read_order", "--read", shuffle]
            with control_group(int(given.memory * 1e9)) as (join, _):
                subprocess.run([*command, "--folder", folder, "--rows", str(given.rows)], check=True, preexec_fn=join)


def make(path: Path, n_rows: int) -> None:
    """Writes the file to the disk."""
    chunk = np.random.default_rng(0).standard_normal((BATCH, DIM)).astype(np.float32).tobytes()
    with open(path, "xb") as file:
        for _ in range(n_rows // BATCH):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, shuffle: str, n_rows: int) -> None:
    """Removes the file from the page cache, reads the first rows of an epoch's order, and prints a line."""
    with open(path, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    n_all = path.stat().st_size // ROW_BYTES
    file = MappedFile(path, (n_all, DIM), torch.float32)
    present = {"source": torch.ones(n_all, dtype=torch.bool)}
    store = RowStore({"source": file.tensor}, present, maps={"source": file}, is_mapped=True)
    order = torch.split(epoch_order(torch.arange(n_all), shuffle, 41, 1)[:n_rows], BATCH)  # type: ignore[arg-type]
    together = batches_read_together(shuffle, BATCH)  # type: ignore[arg-type]
    began, before, n_read = time.monotonic(), disk_reads(path), 0
    for batch in store.batches(order, torch.device("cpu"), together):
        n_read += len(batch.present["source"])
    seconds, reads = time.monotonic() - began, [now - then for now, then in zip(disk_reads(path), before, strict=True)]
    print(
        f"--shuffle {shuffle}: {n_read / seconds:.0f} rows/s; {1000 * reads[0] / n_read:.0f} reads of "
        f"{1000 * reads[1] / n_read / 1e6:.1f} MB per 1,000 rows, {reads[1] / reads[0] / 1e3:.0f} kB each",
        flush=True,
    )


def disk_reads(path: Path) -> tuple[int, int]:
    """Reads completed by the disk that the file is on, and their bytes."""
    device = path.stat().st_dev
    fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(fields[0]), int(fields[2]) * SECTOR


if __name__ == "__main__":
    main()
