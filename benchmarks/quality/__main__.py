"""Compares other models ("peers") with Fusion's runs by their out-of-fold predictions on the same folds.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.quality --data DATA --sources clip_image=my_images qwen_text=my_texts --cache FOLDER

The folds are those of `train --folds 5`, with near-duplicates in one fold. Prints the SMAPE of out-of-fold predictions,
its standard error (with near-duplicates as one observation), and the paired difference to a reference. With
--neighbours and --text, peers are also measured with features of labelled neighbours, and with the texts, as further
inputs. Predictions are kept in --cache, so the same command continues after a stop and only computes what is missing.

    … --models ridge lightgbm --neighbours --text             some peers, with all inputs
    … --output OUTPUT --runs my-run                           also Fusion's runs, trained with --folds 5

Writes table.md and table.json into --cache. Everything takes hours on 2 cores; select a part with --models and
--only-folds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality import table
from benchmarks.quality.catalog import Catalog, read_catalog
from benchmarks.quality.fold import open_fold
from benchmarks.quality.inputs import VARIANTS, Shared
from benchmarks.quality.peers import PEERS, Peer
from benchmarks.quality.predictions import Cache, compute, gathered
from benchmarks.quality.runs import read_runs
from fusion import log, storage
from fusion.command import guarded
from fusion.command.settings import from_json
from fusion.config import RunConfig
from fusion.errors import ConfigError, DataError, Parser

# Flags with the meaning and the default that they have in `train`, except for the default of --folds.
OF_TRAINING = ("data", "folds", "seed", "text_column", "group_column", "max_missing", "drop_bad_prices")
NOT_MEASURED = {
    "TabPFN, TabICL and Mitra": "their weights have to be downloaded from a hub",
    "AutoGluon": "its releases need an older pandas than Fusion's",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return guarded(lambda: _main(_parsed(argv)))


def _main(options: argparse.Namespace) -> int:
    catalog = read_catalog(_config(options), dict(options.sources), with_text=options.text)
    ours = read_runs(options.runs, options.output, catalog)
    cache = Cache(options.cache, catalog)
    asked = _asked(options)
    for number in range(options.folds) if options.only_folds is None else options.only_folds:
        shared = Shared(open_fold(catalog, number), torch.device(options.device))
        for each in asked:
            compute(cache, *each, shared)
    found = [one for each in asked if (one := gathered(cache, *each)) is not None]
    if not found and not ours:
        raise DataError(f"{options.cache} has no predictions of these peers", "leave out --only-folds")
    _finish(options, catalog, table.scored([*found, *table.blends(found, ours, catalog), *ours], catalog))
    return 0


def _finish(options: argparse.Namespace, catalog: Catalog, scores: list[table.Score]) -> None:
    scores = table.compared(scores, options.reference, catalog)
    shown = table.markdown(scores, catalog)
    left_out = "".join(f"Not measured: {name}: {reason}.\n" for name, reason in NOT_MEASURED.items())
    print(f"{shown}\n{left_out}", end="")
    options.cache.mkdir(parents=True, exist_ok=True)
    (options.cache / "table.md").write_text(shown)
    (options.cache / "table.json").write_bytes(storage.as_json(table.document(scores, catalog)))


def _config(options: argparse.Namespace) -> RunConfig:
    given = {name: getattr(options, name) for name in OF_TRAINING if getattr(options, name) is not None}
    return from_json(RunConfig, json.dumps(given), "the command")


def _asked(options: argparse.Namespace) -> list[tuple[str, Peer, str]]:
    """Name, peer and inputs of everything to measure."""
    given = {"neighbours": options.neighbours, "text": options.text}
    variants = [one for one in VARIANTS if all(given[word] for word in one.split(" + ")[1:])]
    peers = _installed(options.models)
    return [(name, peer, one) for name, peer in peers.items() for one in variants if one in peer.variants]


def _installed(names: Sequence[str] | None) -> dict[str, Peer]:
    """The peers to measure: those that were named, or all whose library is installed.

    Raises:
        ConfigError: the library of a named peer is not installed.
    """
    missing = {name: PEERS[name].library for name in names or PEERS if PEERS[name].version() is None}
    remedy = "pip install -r benchmarks/requirements.txt"
    if names and missing:
        name, library = next(iter(missing.items()))
        raise ConfigError(f"--models names {name}, but {library} is not installed", remedy)
    for name, library in missing.items():
        log.warning(event="not_measured", peer=name, reason=f"{library} is not installed", hint=remedy)
    return {name: PEERS[name] for name in names or PEERS if name not in missing}


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="bucket or folder with train.csv and embeddings/train")
    parser.add_argument(
        "--sources", required=True, nargs="+", type=binding, metavar="ROLE=NAME", help="sources that peers are given"
    )
    parser.add_argument("--cache", required=True, type=Path, help="folder that predictions and tables are kept in")
    parser.add_argument("--models", nargs="+", choices=list(PEERS), help="peers to measure (default: all installed)")
    parser.add_argument("--runs", nargs="*", default=[], metavar="RUN", help="runs to compare with: ids or folders")
    parser.add_argument("--output", default="output", help="bucket or folder of the runs that are named by their ids")
    parser.add_argument("--neighbours", action="store_true", help="also measure with features of labelled neighbours")
    parser.add_argument("--text", action="store_true", help="also measure with the texts of --text-column")
    parser.add_argument("--reference", help="name in the table (default: the best of --runs, else the best peer)")
    parser.add_argument("--folds", type=int, default=5, help="as of the training")
    parser.add_argument(
        "--only-folds", type=int, nargs="*", metavar="K", help="compute only these folds; without values, no fold"
    )
    parser.add_argument("--seed", type=int, default=41, help="of the folds, as of the training")
    parser.add_argument("--text-column", help="as of the training")
    parser.add_argument("--group-column", help="as of the training")
    parser.add_argument("--max-missing", type=float, help="as of the training")
    parser.add_argument("--drop-bad-prices", action="store_true", help="as of the training")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of kernel, xgboost, tabm and realmlp")
    options = parser.parse_args(argv)
    _check(options)
    return options


def binding(text: str) -> tuple[str, str]:
    role, equals, name = text.partition("=")
    if not role or (equals and not name):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected ROLE=NAME such as clip_image=my_images")
    return role, name or role


def _check(options: argparse.Namespace) -> None:
    wrong = [fold for fold in options.only_folds or () if not 0 <= fold < options.folds]
    if wrong:
        raise ConfigError(f"--only-folds names {wrong[0]}, expected 0..{options.folds - 1}", "--only-folds 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch finds no GPU here", "--device cpu")


if __name__ == "__main__":
    sys.exit(main())
