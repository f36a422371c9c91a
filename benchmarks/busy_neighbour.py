"""Step time of training beside a busy process: `python benchmarks/busy_neighbour.py [--steps 20] [--spin 300000 1000]`.

OpenMP threads wait for each other at the end of each parallel loop, by spinning, because usually the others arrive
soon. If another process occupies a core, even at the lowest priority, one of them arrives late, and all wait for a time
slice in each of the thousands of loops of a step. `GOMP_SPINCOUNT` sets how often a thread polls before it sleeps: the
library's default is 300000, that of Fusion's commands 1000 (see `fusion.environment`).

Trains all_embeddings on 1,280 rows with the published dimensions, in a new process for each setting, and prints the
median time per step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STEPS = """
import sys, time
import numpy as np, pandas as pd, torch
from fusion.all_embeddings.config import Config
from fusion.all_embeddings.model import build_network
from fusion.distributed.world import join_world
from fusion.data.row_store import RowStore
from fusion.training.trainer import Fit
from fusion.training.dataset import TrainingData
from fusion.training.order import epoch_batches
from fusion.prediction.predict import make_model

DIMS = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}
ROWS, VALIDATION = 1280, 64
torch.manual_seed(0)
values = {role: torch.randn(ROWS + VALIDATION, dim) for role, dim in DIMS.items()}
present = {role: torch.ones(ROWS + VALIDATION, dtype=torch.bool) for role in DIMS}
config = Config(recipe="published")
rows, targets = torch.arange(ROWS + VALIDATION), torch.rand(ROWS + VALIDATION) * 5
with join_world("cpu") as world:
    prices, ids = np.full(VALIDATION, 9.0), pd.RangeIndex(VALIDATION).astype("str")
    folds, all_prices, all_ids = (rows < ROWS).long(), np.expm1(targets.numpy()), rows.numpy().astype(str)
    store = RowStore(values, present, folds=folds, groups=rows)
    data = TrainingData(store, targets, rows[:ROWS], rows[ROWS:], prices, ids, None, all_ids, all_prices, folds, rows)
    fit = Fit(config, make_model(config, build_network, DIMS), data, world)
    seconds = []
    fit.model.train()
    for batch in epoch_batches(config, data.train, 1, world) * (int(sys.argv[1]) // 5 + 1):
        start = time.perf_counter()
        fit._train_batch(batch, fit.store.batch(batch.rows[batch.part], world.device))
        fit.step += 1
        seconds.append(time.perf_counter() - start)
print(np.median(seconds[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of 256 rows each (default: 20)")
    parser.add_argument("--spin", type=int, nargs="+", default=[300_000, 1000], help="values of GOMP_SPINCOUNT")
    options = parser.parse_args()
    for n_neighbours in (0, 1):
        for spin in options.spin:
            with _neighbours(n_neighbours):
                seconds = _step_time(options.steps, spin)
            print(
                f"GOMP_SPINCOUNT {spin}, {n_neighbours} busy neighbours: {seconds * 1000:.0f} ms per step", flush=True
            )


def _step_time(n_steps: int, spin: int) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["GOMP_SPINCOUNT"] = str(spin)
    command = [sys.executable, "-c", STEPS, str(n_steps)]
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


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
