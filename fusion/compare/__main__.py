"""Compares runs on the rows that all of them validated on, and shows whether they differ by more than chance:

    python -m fusion.compare RUN RUN … --output s3://bucket/output

RUN is the id of a run under --output, or the URL of its folder. For each run, the table shows its SMAPE on the shared
rows with a 95% interval, and its mean difference to the best run, with a standard error. Errors of near-duplicates are
not independent, so standard errors are computed from whole groups of them. Fold runs of one recipe count as one run
that validated on all rows. A run that validated on other rows is listed apart; it is compared with the best run on the
rows that both validated on, if there are at least 100. The command only reads, and needs no GPU. `jobs/pull.py compare`
shows the metrics of runs by group.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from fusion import storage
from fusion.command import guarded
from fusion.compare.comparison import compare
from fusion.compare.out_of_fold import scored_runs
from fusion.compare.report import show
from fusion.environment import variable
from fusion.errors import ExitCode, Parser, filled, seconds


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m fusion.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.example = "my-run-1 my-run-2 --output s3://my-bucket/output"
    parser.add_argument("runs", metavar="RUN", nargs="+", type=filled("RUN"), help="ids of runs, or URLs of folders")
    parser.add_argument(
        "--output",
        metavar="URL",
        type=filled("--output"),
        default=variable("FUSION_OUTPUT") or "output",
        help="bucket or folder with runs/ (default: FUSION_OUTPUT, else output)",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    parser.add_argument(
        "--store-timeout",
        metavar="S",
        type=seconds,
        default=variable("FUSION_STORE_TIMEOUT") or "60",
        help="seconds to retry a store that does not answer (default: 60)",
    )
    return parser.parse_args(argv)


def _job(arguments: argparse.Namespace) -> ExitCode:
    storage.set_patience(arguments.store_timeout)
    found = compare(scored_runs(arguments.runs, arguments.output))
    if arguments.json:
        sys.stdout.write(storage.as_json(asdict(found)).decode())
    else:
        show(found)
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; gives its exit code. `--help` raises SystemExit, as argparse does."""
    return guarded(lambda: _job(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
