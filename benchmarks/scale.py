"""Seconds and memory per row as tables grow: `python -m benchmarks.scale [--rows 100000 1000000] [--ranks 1 2]`.

    [--repeats 1] [--json FILE] [--compare BEFORE AFTER]

Generates tables with texts of 10 to 40,000 characters and four small sources in a temporary folder (below --folder).
Then runs four stages on them with a tiny model, each in new processes on CPUs: reading and splitting, training of one
epoch, evaluation, and prediction. The model has no neighbours, whose search is not a cost per row: it compares each row
with all others (`benchmarks/neighbours.py`). Prints a line per stage with:

- seconds, and microseconds per row of wall time and of CPU time (of all ranks together). On a machine that others use,
  only the CPU time shows whether the cost per row is constant.
- peak memory without that of the libraries: of rank 0 in MiB; the same without the tensors of the embeddings, as a
  multiple of the size of the table's file; and of the largest other rank, without these tensors, in bytes per row.

Then it prints, for each stage, the CPU time per row of each number of rows, its ratio to that of the number before, and
the time per row of only the rows that were added: without what a process costs that reads no row.

--compare reads two files of --json and says which CPU times changed, by Welch's t-test of the logarithms at p < 0.01.
10 million rows need 10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from benchmarks import machine

SOURCES = ("clip_image", "siglip_image", "siglip_text", "qwen_text")
DIM = 8  # of each source; small, because this measures the cost per row, not per number of a vector
TEST_SHARE = 4  # the training table has so many rows per row of the test table
CHUNK = 100_000  # rows generated at a time
# Lengths of texts in characters: lognormal, with the median and spread of a shop's titles; one in 10,000 is the
# longest.
MEDIAN_LENGTH, SPREAD, SHORTEST, LONGEST, SHARE_OF_LONGEST = 60, 0.9, 10, 40_000, 1e-4
SHARE_OF_COPIES = 0.03  # share of texts that equal that of another row
FLAGS = ["--neighbours", "0", "--width", "8", "--hidden", "8", "--device", "cpu", "--epochs", "1", "--run-id", "scale"]
FLAGS += ["--batch-size", "4096", "--checkpoint-seconds", "3600"]
EMBEDDING_BYTES = len(SOURCES) * (4 * DIM + 2)  # per row: float32 values, and two bools (present, zeros) per source
VALIDATING = 0.2  # share of the rows that an evaluation predicts; the default of --val-fraction
STAGES = ("read", "train", "evaluate", "predict")

WORKER = """
import json, sys, time
import pyarrow.csv, pyarrow.dataset
from fusion.training import dataset
from fusion.evaluation import evaluate
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.all_embeddings.config import Config
from fusion.distributed.world import join_world
from fusion.command.settings import parse
from fusion.records.start import start_run

def peak():
    status = open("/proc/self/status").read()  # ru_maxrss would include the peak of the parent process
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def read(flags):
    config = parse(Config, flags, prog="scale", description=None)
    with join_world("cpu") as world:
        world.on_main(lambda: start_run(config))
        dataset.read_data(config, world)
    return 0

stage, flags = sys.argv[1], sys.argv[2:]
stages = {"train": train.main, "evaluate": evaluate_by_groups.main, "predict": predict_test.main, "read": read}
before, start, cpu = peak(), time.perf_counter(), time.process_time()
code = stages[stage](flags)
used = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "peak": peak() - before}
print(json.dumps(used))
sys.exit(code)
"""

HEADER = """\
                                      us/row   us/row   rank 0   rank 0 - embeddings   others - embeddings
rows      ranks  stage       seconds    wall      CPU      MiB         x its table             bytes/row"""


@dataclass(frozen=True)
class Measured:
    """Measurements of a stage.

    Attributes:
        seconds: of the slowest rank.
        cpu: seconds of CPU time of all ranks together.
        main, other: bytes of peak memory of rank 0, and of the largest other rank.
        log: of rank 0.
    """

    seconds: float
    cpu: float
    main: int
    other: int
    log: str

    def as_dict(self, n_rows: int) -> dict[str, float]:
        """Seconds, CPU seconds per row, and bytes, by the names that they have in the JSON file."""
        return {
            "seconds": self.seconds,
            "cpu_seconds_per_row": self.cpu / n_rows,
            "peak_bytes": self.main,
            "other_peak_bytes": self.other,
        }


# Rows, ranks and stage to its measurements, by name.
Found = dict[tuple[int, int, str], dict[str, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    stages_help = "evaluate and predict need the model of train, so name it before them"
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help=stages_help)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", help="where the temporary folder is made")
    machine.add_flags(parser)
    settings = parser.parse_args()
    if settings.compare:
        return machine.compare(settings.compare, "cpu_seconds_per_row")
    found: Found = {}
    print(f"{machine.described()}\n{HEADER}", flush=True)
    for n_rows in settings.rows:
        with tempfile.TemporaryDirectory(prefix="fusion-scale-", dir=settings.folder) as folder:
            make(Path(folder), n_rows)
            for number in range(settings.repeats):
                for n_ranks in settings.ranks:
                    output = Path(folder) / f"output-{n_ranks}-{number}"
                    measure(Path(folder), output, n_rows, n_ranks, settings.stages, found)
    show_growth(found, settings)
    if settings.json:
        named = {f"{rows} rows, {ranks} ranks, {stage}": values for (rows, ranks, stage), values in found.items()}
        machine.write(settings.json, named)
    return None


def measure(folder: Path, output: Path, n_rows: int, n_ranks: int, stages: Sequence[str], found: Found) -> None:
    """Runs the stages, prints their lines, and adds their measurements to `found`."""
    where = ["--data", str(folder), "--output", str(output)]
    for stage in stages:
        flags = [*where, *(FLAGS if stage in ("read", "train") else ["--device", "cpu", "--run-id", "scale"])]
        # Prices are random, so the model predicts nearly one price for all, which the checks would refuse to publish.
        flags += ["--force"] if stage == "predict" else []
        measured = run(stage, flags, n_ranks)
        of = n_rows // TEST_SHARE if stage == "predict" else n_rows
        for name, seconds in _parts(stage, measured, n_rows):
            line = f"{n_rows:<9} {n_ranks:<6} {name:<10} {seconds:8.2f} {seconds / of * 1e6:7.2f}"
            whole = _whole(folder, stage, measured, of) if name == stage else ""
            print(line + whole, flush=True)
        for name, value in measured.as_dict(of).items():
            found.setdefault((n_rows, n_ranks, stage), {}).setdefault(name, []).append(value)


def show_growth(found: Found, settings: argparse.Namespace) -> None:
    """Prints for each stage how its CPU time per row grows with the number of rows."""
    print("\nCPU us/row (ratio to the number of rows before; us of each row that was added)")
    print(f"{'ranks  stage':<18}" + "".join(f"{rows:<26}" for rows in settings.rows))
    for ranks in settings.ranks:
        for stage in settings.stages:
            costs = [statistics.median(found[rows, ranks, stage]["cpu_seconds_per_row"]) for rows in settings.rows]
            print(f"{ranks:<6} {stage:<11}" + "".join(f"{cell:<26}" for cell in _growth(settings.rows, costs)))


def _growth(sizes: Sequence[int], costs: Sequence[float]) -> Iterator[str]:
    """A cell for each number of rows, from its CPU seconds per row."""
    for number, (rows, cost) in enumerate(zip(sizes, costs, strict=True)):
        if number == 0:
            yield f"{cost * 1e6:.2f}"
            continue
        fewer, before = sizes[number - 1], costs[number - 1]
        added = (cost * rows - before * fewer) / (rows - fewer) if rows != fewer else cost
        yield f"{cost * 1e6:.2f} ({cost / before:.2f}; {added * 1e6:.2f})"


def _whole(folder: Path, stage: str, found: Measured, n_rows: int) -> str:
    """CPU time and memory of a stage, formatted for its line."""
    table = folder / ("test.csv" if stage == "predict" else "train.csv")
    embeddings = EMBEDDING_BYTES * n_rows * (VALIDATING if stage == "evaluate" else 1)
    main = (found.main - embeddings) / table.stat().st_size
    other = (found.other - embeddings) / n_rows if found.other else 0
    return f" {found.cpu / n_rows * 1e6:8.2f} {found.main / 2**20:8.0f} {main:19.2f} {other:21.0f}"


def _parts(stage: str, found: Measured, n_rows: int) -> Iterator[tuple[str, float]]:
    """Seconds of the parts of a stage, which are taken from its log, and of the whole stage."""
    if stage == "read":
        reading = float(re.findall(r"event=read .*seconds=(\S+)", found.log)[-1])
        yield "reading", reading
        yield "splitting", found.seconds - reading
    if stage == "train":
        n_train, rate = re.findall(r"train=(\d+)", found.log), re.findall(r"rows_s=(\S+)", found.log)
        yield "one epoch", int(n_train[-1]) / float(rate[-1]) if n_train else n_rows * 0.8 / float(rate[-1])
    yield stage, found.seconds


def run(stage: str, flags: list[str], n_ranks: int) -> Measured:
    """Runs a stage in new processes, one per rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_start(stage, flags, rank, n_ranks, port) for rank in range(n_ranks)]
    outputs = [rank.communicate() for rank in ranks]
    for rank, (_, log) in zip(ranks, outputs, strict=True):
        if rank.returncode:
            sys.exit(f"{stage} ended with {rank.returncode}:\n{log[-3000:]}")
    used = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    peaks = [one["peak"] for one in used]
    seconds, cpu = max(one["seconds"] for one in used), sum(one["cpu"] for one in used)
    return Measured(seconds, cpu, peaks[0], max(peaks[1:], default=0), outputs[0][1])


def _start(stage: str, flags: list[str], rank: int, n_ranks: int, port: int) -> subprocess.Popen[str]:
    variables = {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n_ranks}
    variables |= {"MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-c", WORKER, stage, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def make(folder: Path, n_rows: int) -> None:
    """Writes train.csv, test.csv and four sources for each, with their rows in different orders."""
    generator = np.random.default_rng(0)
    for split, n in (("train", n_rows), ("test", n_rows // TEST_SHARE)):
        _write_table(folder / f"{split}.csv", n, generator, priced=split == "train")
        for name in SOURCES:
            _write_source(folder / "embeddings" / split / f"{name}.parquet", n, generator)


def _write_table(path: Path, n_rows: int, generator: np.random.Generator, *, priced: bool) -> None:
    letters = generator.choice(np.frombuffer(b"abcdefghijklmnopqrstuvwxyz    ", np.uint8), 1 << 24)
    ids = generator.permutation(n_rows)
    names = ["sample_id", "price", "catalog_content", "category"]
    schema = pa.schema([(name, pa.large_string()) for name in names if priced or name != "price"])
    with pacsv.CSVWriter(path, schema) as writer:
        for start in range(0, n_rows, CHUNK):
            chunk = ids[start : start + CHUNK]
            prices = pa.array(np.round(generator.lognormal(3, 1, len(chunk)) + 0.5, 2)).cast(pa.large_string())
            texts = _texts(len(chunk), letters, generator)
            kinds = pc.binary_join_element_wise("kind", pa.array(chunk % 20).cast(pa.string()), "-")
            columns = [pa.array(chunk), prices, texts, kinds] if priced else [pa.array(chunk), texts, kinds]
            writer.write(pa.record_batch([column.cast(pa.large_string()) for column in columns], schema=schema))


def _texts(n: int, letters: np.ndarray, generator: np.random.Generator) -> pa.Array:
    lengths = generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD, n).astype(np.int64).clip(SHORTEST, LONGEST)
    lengths[generator.random(n) < SHARE_OF_LONGEST] = LONGEST
    starts = generator.integers(0, len(letters) - LONGEST, n)
    copies = np.flatnonzero(generator.random(n) < SHARE_OF_COPIES)
    lengths[copies], starts[copies] = lengths[copies - 1], starts[copies - 1]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    text = letters[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)]
    return pa.LargeStringArray.from_buffers(n, pa.py_buffer(offsets), pa.py_buffer(text))


def _write_source(path: Path, n_rows: int, generator: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = generator.permutation(n_rows)
    schema = pa.schema([("sample_id", pa.int64()), ("embedding", pa.list_(pa.float32(), DIM))])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, n_rows, CHUNK):
            chunk = ids[start : start + CHUNK]
            values = pa.array(generator.standard_normal(len(chunk) * DIM, dtype=np.float32))
            column = pa.FixedSizeListArray.from_arrays(values, DIM)
            writer.write_batch(pa.record_batch([pa.array(chunk), column], schema=schema))


if __name__ == "__main__":
    main()
