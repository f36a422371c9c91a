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
from fusion.command.parser import add_output, add_store_timeout, command_parser
from fusion.compare.comparison import compare
from fusion.compare.out_of_fold import scored_runs
from fusion.compare.tables import show
from fusion.errors import ExitCode, filled


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    example = "my-run-1 my-run-2 --output s3://my-bucket/output"
    parser = command_parser("python -m fusion.compare", __doc__, example)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=filled("RUN"), help="ids of runs, or URLs of folders")
    add_output(parser, "bucket or folder with runs/")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    add_store_timeout(parser)
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
