"""Brings embeddings into the layout that training reads: aligned with the table, in checked files of bounded size.

    python -m fusion.prepare --table products.csv --split train --to data \\
        --source clip_image=part1.npy,ids1.npy --source clip_image=part2.npy,ids2.npy \\
        --source 'qwen_text=vectors/*.parquet'
    python -m fusion.prepare --split test --to s3://bucket/data --source qwen_text=s3://bucket/raw/qwen/

A source may have its rows in any order and in any number of files: Parquet with the columns sample_id and embedding
(a file, a folder, or a pattern in quotes), or .npy files of vectors with .npy files of their ids. Several --source of
one name make one source. A source of each fold is --source 'clip_{fold}=fold_{fold}/*.parquet' --folds 5.

Writes <to>/embeddings/<split>/<source>/part-00000.parquet and so on, sorted by sample_id, and _MANIFEST.json with the
sha256 of each file. Part k of every source has the vectors of the same rows of the table. Rows without a vector are
left out. The table is copied to <to>/<split>.csv or .parquet. `python -m fusion.verify` checks the folder of a source.

Memory does not grow with the number of vectors: the command needs about 0.5 GB, a few times the size of one part, and
the size of the table. Vectors pass through a temporary folder (TMPDIR), which needs room for one source.

With --engine ray (pip install 'ray[data]') the workers of a Ray cluster read the files, shuffle the rows and write the
shards, for sources that one machine cannot hold. The result has the same bytes. All workers must have this package and
reach all URLs: a bucket, or a folder that all nodes share. They use the credentials and endpoints of this command.
Vectors pass through Ray's object store; shards are written beside the final ones, and copied when all are checked.
The cluster is that of --ray-address or RAY_ADDRESS; `ray job submit -- python -m fusion.prepare …` works too.

A source whose files and table have not changed is left as it is. If the command is stopped or killed, run it again:
the result has the same bytes. If two commands write one source at the same time, the one that begins to write later
completes it, and the other ends with 78. This needs polars, and no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from fusion import signals, storage
from fusion.command import guarded
from fusion.command.parser import add_store_timeout, command_parser
from fusion.environment import variable
from fusion.errors import ExitCode, Parser, UsageError, filled
from fusion.prepare.requests import requests
from fusion.terminal.help_screen import Rare

SHARD_ROWS = 16_384  # two row groups; with 1,024 numbers of float32 per vector, a shard is a file of 64 MiB
_INSTALLED_BY = {"polars": "polars", "ray": "'ray[data]'"}
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a share from 0 to 1")
    return float(text)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected 1 or more")
    return int(text)


def _split(text: str) -> str:
    if not _SPLIT.fullmatch(text):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a name such as train or test")
    return text


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    example = "--table products.csv --to data --source clip_image=vectors.npy,ids.npy"
    paths = "URLs are paths or fsspec URLs such as s3://bucket/a. Patterns are * ? [...] within one part of a path."
    parser = command_parser("python -m fusion.prepare", __doc__, example, epilog=paths)
    _add_files(parser)
    _add_rules(parser)
    parser.add_argument(
        "--engine",
        choices=("polars", "ray"),
        default="polars",
        help="polars: this machine; ray: a Ray cluster, or else processes on this machine (default: polars)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        type=filled("--ray-address"),
        help=Rare("of the cluster (default: RAY_ADDRESS, or the cluster that `ray start` has started on this machine)"),
    )
    add_store_timeout(parser)
    return parser.parse_args(argv)


def _add_files(parser: Parser) -> None:
    parser.add_argument(
        "--source",
        metavar="NAME=URL[,URL]",
        action="append",
        required=True,
        help="name of a source, and its Parquet files, or its .npy files of vectors and of ids; may be repeated",
    )
    parser.add_argument(
        "--to",
        metavar="URL",
        type=filled("--to"),
        default=variable("FUSION_DATA"),
        required=not variable("FUSION_DATA"),
        help="folder or bucket that training reads (default: FUSION_DATA)",
    )
    parser.add_argument(
        "--table",
        metavar="URL",
        type=filled("--table"),
        help="CSV or Parquet with the column sample_id, copied to --to (default: the one that is there)",
    )
    parser.add_argument("--split", type=_split, default="train", help="train, test, or another (default: train)")
    parser.add_argument("--folds", metavar="N", type=_positive, default=0, help=Rare("{fold} in --source is 0 to N-1"))


def _add_rules(parser: Parser) -> None:
    parser.add_argument(
        "--max-missing",
        metavar="SHARE",
        type=_share,
        default=0.05,
        help="largest share of the table's rows that a source may lack (default: 0.05)",
    )
    parser.add_argument(
        "--drop-bad-vectors", action="store_true", help=Rare("leave out vectors with NaN or infinite values")
    )
    parser.add_argument(
        "--shard-rows",
        metavar="N",
        type=_positive,
        default=SHARD_ROWS,
        help=Rare(f"rows of the table per file; the same for all sources of a split (default: {SHARD_ROWS})"),
    )


def _job(argv: Sequence[str] | None) -> ExitCode:
    arguments = _parse(argv)
    if arguments.ray_address and arguments.engine != "ray":
        raise UsageError("--ray-address has no effect without Ray", "add --engine ray, or leave it out")
    found = requests(arguments.source, arguments.folds)
    for package in dict.fromkeys(["polars", arguments.engine]):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed", f"pip install {_INSTALLED_BY[package]}")
    from fusion.prepare.prepare import Options, prepare

    storage.set_patience(arguments.store_timeout)
    options = Options(
        found,
        arguments.table,
        arguments.split,
        arguments.to,
        arguments.max_missing,
        arguments.drop_bad_vectors,
        arguments.shard_rows,
        arguments.engine,
    )
    with signals.listening(), _engine(arguments):
        for line in prepare(options):
            print(line, flush=True)
    return ExitCode.DONE


def _engine(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Starts what the engine needs, for as long as the context lasts."""
    if arguments.engine != "ray":
        return nullcontext()
    from fusion.prepare.on_ray import cluster

    return cluster(arguments.ray_address)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. `--help` raises SystemExit, as in argparse."""
    return guarded(lambda: _job(argv))


if __name__ == "__main__":
    sys.exit(main())
