"""Seconds to a validation SMAPE, for Fusion and other models: `python -m benchmarks.time_to_quality --data DATA …`.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.time_to_quality --data DATA --sources clip_image=my_images qwen_text=my_texts \\
        [--repeats 3] [--json FILE] [--compare BEFORE AFTER]

Trains each system in new processes on the rows of `train --folds 5 --fold 0`: the default recipe of `all_embeddings`,
and peers of `benchmarks.quality`, with their settings. After each epoch, or each 25 rounds of boosting, its SMAPE is
measured on the fold's validation rows, which it does not train on. Prints wall and CPU seconds until each threshold is
first reached: from the start, with its libraries loaded, reading of the files and preparation of inputs included. The
time of these measurements does not count. A system that ends above a threshold never reaches it; a peer ends at
--limit CPU seconds, and may then not have reached it yet.

--compare reads two files of --json and says which seconds changed, by Welch's t-test of the logarithms at p < 0.01.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import machine
from benchmarks.quality import neural, peers
from benchmarks.quality.__main__ import binding
from benchmarks.quality.catalog import read_catalog
from benchmarks.quality.fold import log_smape, open_fold
from benchmarks.quality.inputs import Inputs, Shared
from fusion.config import RunConfig
from fusion.prediction.resumable import Arrays
from fusion.training.loop import Fit
from fusion.training.trainer import Beat

FUSION = "fusion"
VARIANT_FLAGS: list[str] = []  # further flags of Fusion's training: none, so that the default recipe is measured
FOLDS, FOLD = 5, 0
EVERY_ROUNDS = 25  # boosting rounds between two measurements; a round is much shorter than an epoch
# Name to the steps of a peer's training, steps between two measurements, and the module whose import does not count.
PEERS: dict[str, tuple[Callable[..., Iterator[peers.Predict]], int, str]] = {
    "mlp": (peers.mlp_epochs, 1, "sklearn.neural_network"),
    "lightgbm": (peers.lightgbm_rounds, EVERY_ROUNDS, "lightgbm"),
    "tabm": (neural.tabm_epochs, 1, "tabm"),
}
THRESHOLDS = (45.0, 42.0, 40.0, 38.0, 36.0, 34.0, 32.0)
Sources = Mapping[str, str]


@dataclass
class Clock:
    """Wall and CPU seconds since it was made, without those while it was paused.

    Attributes:
        curve: wall seconds, CPU seconds and SMAPE of each measurement.
    """

    curve: list[tuple[float, float, float]] = field(default_factory=list)
    _wall: float = field(default_factory=time.perf_counter)
    _cpu: float = field(default_factory=time.process_time)

    @contextmanager
    def measuring(self) -> Iterator[Callable[[float], None]]:
        """Pauses the clock, and gives the function that takes the SMAPE measured at this time."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield lambda smape: self.curve.append((round(wall - self._wall, 3), round(cpu - self._cpu, 3), smape))
        self._wall += time.perf_counter() - wall
        self._cpu += time.process_time() - cpu


def main() -> None:
    given = _parsed()
    if given.compare:
        for measure in ("seconds", "cpu_seconds"):
            machine.compare(given.compare, measure)
        return
    curves: dict[str, list[list[tuple[float, float, float]]]] = {name: [] for name in given.only}
    for _ in range(given.repeats):
        for name in given.only:
            curves[name].append(curve(name, given.data, dict(given.sources), given.limit))
    show(curves, given.thresholds, given.limit)
    if given.json:
        machine.write(given.json, settings(curves, given.thresholds), folds=FOLDS, fold=FOLD, curves=curves)


def curve(name: str, data: str, sources: Sources, limit: float) -> list[tuple[float, float, float]]:
    """Wall seconds, CPU seconds and SMAPE in the course of one training, in a new process."""
    run = partial(of_fusion, data, sources) if name == FUSION else partial(of_peer, name, data, sources, limit)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run).result()


def of_peer(name: str, data: str, sources: Sources, limit: float) -> list[tuple[float, float, float]]:
    steps, every, module = PEERS[name]
    importlib.import_module(module)
    clock = Clock()
    config = RunConfig(data=data, folds=FOLDS)
    catalog = read_catalog(config, sources, with_text=False)
    inputs = Inputs(Shared(open_fold(catalog, FOLD), torch.device("cpu")), "embeddings")
    held = inputs.fold.held
    for number, predict in enumerate(steps(inputs, peers.PEERS[name].settings, inputs.fold.train), 1):
        if number % every == 0:
            with clock.measuring() as found:
                found(log_smape(predict(held), catalog.logs[held]))
            if clock.curve[-1][1] > limit:
                break
    return clock.curve


def of_fusion(data: str, sources: Sources) -> list[tuple[float, float, float]]:
    """Trains with the command, which also writes its checkpoints; its own validations are the measurements."""
    from fusion.all_embeddings import model, train

    assert model  # loaded here, because the command loads it only when it runs
    bound = [text for role, name in sources.items() for text in (f"--sources.{role.replace('_', '-')}", name)]
    fold = ["--folds", str(FOLDS), "--fold", str(FOLD)]
    with tempfile.TemporaryDirectory() as output:
        clock = Clock()
        with patch("fusion.training.loop.Fit", partial(_Measured, clock)):
            code = train.main(["--data", data, "--output", output, "--device", "cpu", *fold, *bound, *VARIANT_FLAGS])
    if code:
        sys.exit(code)
    return clock.curve


class _Measured(Fit):
    """Gives the SMAPE of each validation to a clock."""

    def __init__(self, clock: Clock, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.clock = clock

    def _validate(self, beat: Beat) -> tuple[float, Arrays]:
        with self.clock.measuring() as found:
            smape, computed = super()._validate(beat)
            found(smape)
        return smape, computed


def reached(curve: list[tuple[float, float, float]], threshold: float) -> tuple[float, float] | None:
    """Wall and CPU seconds at the first SMAPE of at most the threshold; None if there is none."""
    return next(((wall, cpu) for wall, cpu, smape in curve if smape <= threshold), None)


def settings(curves: Mapping[str, list[Any]], thresholds: list[float]) -> dict[str, dict[str, list[float]]]:
    """The seconds to each threshold that a system reaches in all repetitions."""
    found = {}
    for name, threshold in [(name, threshold) for name in curves for threshold in thresholds]:
        times = [reached(curve, threshold) for curve in curves[name]]
        known = [one for one in times if one is not None]
        if len(known) == len(times):
            wall, cpu = map(list, zip(*known, strict=True))
            found[f"{name} to {threshold:g}"] = {"seconds": wall, "cpu_seconds": cpu}
    return found


def show(curves: Mapping[str, list[Any]], thresholds: list[float], limit: float) -> None:
    """Prints the medians over the repetitions."""
    print(f"{machine.described()}. Seconds to a SMAPE, wall / CPU:\n")
    found = settings(curves, thresholds)
    head = "".join(f"{threshold:>15g}" for threshold in thresholds)
    print(f"{'':<10}{head}{'lowest SMAPE':>15}{'last SMAPE':>13}{'last, wall / CPU':>18}")
    for name, of_system in curves.items():
        unreached = "not yet" if any(curve[-1][1] > limit for curve in of_system) else "never"
        times = (found.get(f"{name} to {threshold:g}") for threshold in thresholds)
        cells = "".join(f"{_cell(one) if one else unreached:>15}" for one in times)
        lowest = np.median([min(smape for _, _, smape in curve) for curve in of_system])
        wall, cpu, last = np.median([curve[-1] for curve in of_system], axis=0)
        whole = _cell({"seconds": [wall], "cpu_seconds": [cpu]})
        print(f"{name:<10}{cells}{lowest:>15.2f}{last:>13.2f}{whole:>18}")


def _cell(times: Mapping[str, list[float]]) -> str:
    return " / ".join(f"{statistics.median(times[measure]):.1f}" for measure in ("seconds", "cpu_seconds"))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="bucket or folder with train.csv and embeddings/train")
    parser.add_argument("--sources", nargs="+", type=binding, default=[], metavar="ROLE=NAME")
    parser.add_argument("--only", nargs="+", choices=[FUSION, *PEERS], default=[FUSION, *PEERS])
    parser.add_argument("--thresholds", nargs="+", type=float, default=list(THRESHOLDS), metavar="SMAPE")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600.0, help="CPU seconds after which a peer is stopped")
    machine.add_flags(parser)
    given = parser.parse_args()
    if not given.compare and not (given.data and given.sources):
        parser.error("give --data and --sources, or --compare")
    return given


if __name__ == "__main__":
    main()
