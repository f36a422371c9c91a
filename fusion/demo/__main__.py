"""A complete example on a generated catalog, from data to a submission: `python -m fusion.demo`, or `make demo`.

Generates about 6,000 products in `demo/data`; trains, evaluates and predicts with `all_embeddings` as a user would; and
compares the submission with the true prices of the test products, which no command has read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.command import guarded
from fusion.command.parser import command_parser
from fusion.demo.catalog import Truth, generate
from fusion.metrics import compute_smape
from fusion.records.best_run import pointed_to
from fusion.records.output import OutputFolder


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m fusion.demo", __doc__, "")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where to write (default: demo)")
    parser.add_argument("--products", type=int, default=6000, help="products to generate (default: 6000)")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training rows (default: 30)")
    return guarded(lambda: _demonstrate(parser.parse_args(argv)))


def _demonstrate(options: argparse.Namespace) -> int:
    started = time.monotonic()
    data, output = options.folder / "data", options.folder / "output"
    truth = generate(data, n_products=options.products)
    where = ["--output", str(output)]
    jobs: list[tuple[Callable[[Sequence[str]], int], list[str]]] = [
        (train.main, ["--data", str(data), *where, "--epochs", str(options.epochs)]),
        (evaluate_by_groups.main, [*where, "--by", "category"]),
        (predict_test.main, where),
    ]
    for job, flags in jobs:
        code = job(flags)
        if code:
            return code
    print(_outcome(options.folder, truth, time.monotonic() - started))
    return 0


def _outcome(folder: Path, truth: Truth, seconds: float) -> str:
    output = str(folder / "output")
    run, current = pointed_to(output, "all_embeddings"), OutputFolder(output).current("test")
    assert run is not None and current is not None, "train and predict publish pointers"
    submission = pd.read_csv(f"{output}/submissions/{current.submission}/submission.csv")
    assert (submission["sample_id"].to_numpy() == truth.sample_ids).all(), "a submission keeps the order of test.csv"
    median = pd.read_csv(folder / "data" / "train.csv")["price"].median()
    ours, best, naive = (
        compute_smape(truth.prices, guess)
        for guess in (submission["price"], truth.medians, np.full(len(submission), median))
    )
    return (
        f"\nreport      {output}/runs/{run.run_id}/report.html"
        f"\nmetrics     {output}/runs/{run.run_id}/metrics"
        f"\nmodel       {output}/runs/{run.run_id}/checkpoints/{run.checkpoint}"
        f"\nsubmission  {output}/submissions/{current.submission}/submission.csv"
        f"\nin {seconds:.0f} s. SMAPE on {len(submission)} test products: "
        f"{ours:.2f} (best possible {best:.2f}, median price {naive:.2f})"
    )


if __name__ == "__main__":
    sys.exit(main())
