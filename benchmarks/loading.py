"""Speed and peak memory of reading embeddings: `python -m benchmarks.loading [--rows 75000] [--url s3://bucket/folder]`.

Writes four sources with the published dimensions to a temporary folder, or below --url, then reads them in new
processes, as training does: into memory, into a cache (`--cache`), and from that cache. Prints the speed in MB of
tensors per second, and the peak memory, without that of the libraries, relative to the size of the tensors.

With an S3 --url, it also fetches all bytes with parallel requests for ranges, without reading what is in them, and
prints the speed relative to that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion import storage
from fusion.data.embeddings import N_THREADS
from fusion.data.source_file import STREAM_BYTES

DIMS = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}

READ = """
import json, sys, time
import pandas as pd
from fusion.distributed.world import join_world
from fusion.data.embeddings import load

def peak():
    status = open("/proc/self/status").read()  # ru_maxrss would include the peak of the parent process
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

data, names, cache = sys.argv[1], sys.argv[3].split(","), sys.argv[4] or None
ids = pd.Index([str(i) for i in range(int(sys.argv[2]))])
with join_world("cpu") as world:
    load(data, "train", {"a": "tiny"}, ids[:1], world)
    before, start = peak(), time.perf_counter()
    store = load(data, "train", dict(zip(names, names)), ids, world, cache=cache)
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": store.n_bytes, "peak": peak() - before}))
"""


@dataclass(frozen=True)
class Read:
    """One reading.

    Attributes:
        peak: bytes of memory beside those of the libraries; mapped pages count.
    """

    seconds: float
    bytes: int
    peak: int

    @property
    def rate(self) -> float:
        return self.bytes / 1e6 / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=75_000)
    parser.add_argument("--url", help="folder or bucket to read from (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest reading counts")
    given = parser.parse_args()
    for dtype in (np.float16, np.float32):
        for group, kind in ((8192, "row groups of 8192"), (given.rows, "one row group")):
            with tempfile.TemporaryDirectory() as folder:
                data = given.url or f"{folder}/data"
                write(data, "tiny", 1, 4, np.float32, 1)
                for name, dim in DIMS.items():
                    write(data, name, given.rows, dim, dtype, group)
                measure(f"{np.dtype(dtype).name}, {kind}", data, folder, given.rows, given.repeats)


def measure(what: str, data: str, folder: str, n_rows: int, repeats: int) -> None:
    memory = min((read(data, n_rows) for _ in range(repeats)), key=lambda one: one.seconds)
    cache = f"{folder}/cache"
    written, opened = read(data, n_rows, cache), read(data, n_rows, cache)
    print(f"{what}: {memory.bytes / 1e6:.0f} MB")
    for name, one in {"into memory": memory, "into the cache": written, "from the cache": opened}.items():
        peak = one.peak / one.bytes
        print(f"  {name:<15} {one.seconds:6.2f} s {one.rate:6.0f} MB/s, peak {peak:.2f}x", flush=True)
    if data.startswith("s3://"):
        plain = max(fetch(data) for _ in range(repeats))
        print(f"  plain requests for ranges {plain:6.0f} MB/s; into memory is {memory.rate / plain:.2f} times that")


def read(data: str, n_rows: int, cache: str = "") -> Read:
    command = [sys.executable, "-c", READ, data, str(n_rows), ",".join(DIMS), cache]
    return Read(**json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def fetch(data: str) -> float:
    """MB per second of parallel requests for all ranges of all sources."""
    found = [entry for path, entry in storage.find(f"{data}/embeddings/train").items() if not path.startswith("tiny")]
    spans = [(entry, start) for entry in found for start in range(0, entry.size, STREAM_BYTES)]

    def get(span: tuple[storage.Entry, int]) -> int:
        entry, start = span
        with storage.open_read(entry.url, entry.size, (start, min(start + STREAM_BYTES, entry.size))) as file:
            file.seek(start)
            return len(file.read(STREAM_BYTES))

    began = time.perf_counter()
    with ThreadPoolExecutor(N_THREADS) as pool:
        n_bytes = sum(pool.map(get, spans))
    return n_bytes / 1e6 / (time.perf_counter() - began)


def write(data: str, name: str, rows: int, dim: int, dtype: type, group: int) -> None:
    values = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32).astype(dtype)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dim)
    table = pa.table({"sample_id": np.arange(rows), "embedding": column})
    content = pa.BufferOutputStream()
    pq.write_table(table, content, row_group_size=group, compression="none", use_dictionary=False)
    storage.write(f"{data}/embeddings/train/{name}.parquet", content.getvalue().to_pybytes())


if __name__ == "__main__":
    main()
