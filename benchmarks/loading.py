"""Speed and peak memory of reading embeddings: `python benchmarks/loading.py [--rows 75000]`.

Writes four sources with the published dimensions to a temporary folder, then reads them in a new process, as training
does. Prints the speed in MB of tensors per second, and the peak memory, without that of the libraries, relative to the
size of the tensors.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIMS = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}

READ = """
import sys, time
import pandas as pd
from fusion.distributed.world import join_world
from fusion.data.embeddings import load

def peak():
    status = open("/proc/self/status").read()  # ru_maxrss would include the peak of the parent process
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

names = sys.argv[3].split(",")
ids = pd.Index([str(i) for i in range(int(sys.argv[2]))])
with join_world("cpu") as world:
    load(sys.argv[1], "train", {"a": "tiny"}, ids[:1], world)
    before, start = peak(), time.perf_counter()
    store = load(sys.argv[1], "train", dict(zip(names, names)), ids, world)
    seconds, size = time.perf_counter() - start, sum(v.nbytes for v in store.values.values())
    rate, relative_peak = size / 1e6 / seconds, (peak() - before) / size
    print(f"{size / 1e6:.0f} MB in {seconds:.2f} s: {rate:.0f} MB/s, peak {relative_peak:.2f}x")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=75_000)
    rows = parser.parse_args().rows
    for dtype in (np.float16, np.float32):
        for group, kind in ((8192, "row groups of 8192"), (rows, "one row group")):
            with tempfile.TemporaryDirectory() as folder:
                _write(Path(folder), "tiny", 1, 4, np.float32, 1)
                for name, dim in DIMS.items():
                    _write(Path(folder), name, rows, dim, dtype, group)
                print(f"{np.dtype(dtype).name}, {kind}: ", end="", flush=True)
                subprocess.run([sys.executable, "-c", READ, folder, str(rows), ",".join(DIMS)], check=True)


def _write(folder: Path, name: str, rows: int, dim: int, dtype: type, group: int) -> None:
    path = folder / "embeddings" / "train" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32).astype(dtype)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dim)
    table = pa.table({"sample_id": np.arange(rows), "embedding": column})
    pq.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False)


if __name__ == "__main__":
    main()
