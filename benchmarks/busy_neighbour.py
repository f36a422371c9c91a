"""Epochs beside busy processes: `python -m benchmarks.busy_neighbour [--rows 20000] [--spin 300000 20000 2000]`.

OpenMP threads wait for each other at the end of each parallel loop, by spinning, because usually the others arrive
soon. If another process occupies a core, even at the lowest priority, one of them arrives late, and all wait for a time
slice in each of the thousands of loops of a step. `GOMP_SPINCOUNT` sets how often a thread polls before it sleeps: the
library's default is 300000, that of Fusion's commands 2000 (see `fusion.environment`).

Trains two epochs as `benchmarks.speed` does, in a new process for each setting, and prints the seconds of the second:
on a machine that is otherwise quiet, beside busy processes, and the ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.larger_than_memory import make
from benchmarks.speed import SETTINGS, epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows, of which a fifth validates")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--spin", type=int, nargs="+", default=[300_000, 20_000, 2000], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=["default", "--recipe published"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fusion-neighbour-") as folder:
        make(Path(folder), given.rows)
        for name in given.only:
            for spin in given.spin:
                os.environ["GOMP_SPINCOUNT"] = str(spin)
                quiet, busy = (
                    _seconds(Path(folder), name, f"{spin}-{n}", given.rows, given.repeats, n)
                    for n in (0, given.neighbours)
                )
                print(
                    f"{name}, GOMP_SPINCOUNT={spin}: {quiet:.2f} s quiet, {busy:.2f} s busy, {busy / quiet:.2f} times",
                    flush=True,
                )


def _seconds(data: Path, name: str, tag: str, n_rows: int, repeats: int, n_neighbours: int) -> float:
    """The median seconds of an epoch beside this many busy processes."""
    with _neighbours(n_neighbours):
        return statistics.median(epoch(data, name, f"{tag}-{number}", n_rows)[0] for number in range(repeats))


@contextmanager
def _neighbours(n: int) -> Iterator[None]:
    """Runs `n` busy processes of the lowest priority inside the block.

    Each has its own session, like another user's job. The kernel divides CPU time evenly between sessions, whatever
    their priorities are (sched_autogroup).
    """
    command = ["nice", "-n", "19", sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command, start_new_session=True) for _ in range(n)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
