"""Writes the report of a run, report.html in its folder: one page that needs no network and contains no scripts.

    python -m fusion.report --output s3://bucket/output --run-id all-embeddings-1f2e3d4c
    python -m fusion.report --run-dir runs/all-embeddings-1f2e3d4c

Trainings, evaluations and ablations write the report of their run by themselves. The page shows what is in the folder
of the run: the score with its interval, learning curves, errors by group, price intervals, what each source is worth
(after `python -m fusion.ablation`), the worst rows (after evaluate_by_groups), data, settings and lineage. The same run
gives the same bytes. The command needs no GPU and no data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fusion import storage
from fusion.command import guarded
from fusion.command.parser import add_output, add_store_timeout, command_parser
from fusion.environment import prepare_libraries
from fusion.errors import ExitCode, UsageError, filled


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    example = "--output s3://my-bucket/output --run-id my-run-1"
    parser = command_parser("python -m fusion.report", __doc__, example)
    add_output(parser, "bucket or folder with runs/")
    parser.add_argument("--run-id", metavar="RUN", type=filled("--run-id"), help="id of the run to report")
    parser.add_argument("--run-dir", metavar="URL", type=filled("--run-dir"), help="its folder, in place of --run-id")
    add_store_timeout(parser)
    return parser.parse_args(argv)


def _job(arguments: argparse.Namespace) -> ExitCode:
    storage.set_patience(arguments.store_timeout)
    which = arguments.run_dir or arguments.run_id
    if which is None:
        hint = "name the run to report with --run-id or --run-dir"
        raise UsageError("neither --run-id nor --run-dir is given", hint)
    from fusion.compare.out_of_fold import find_run
    from fusion.records.run import RunFolder
    from fusion.report.publish import write_report

    run = find_run(arguments.output, arguments.run_id) if arguments.run_id else RunFolder(which.rstrip("/"))
    print(write_report(run))
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; gives its exit code. `--help` raises SystemExit, as argparse does."""
    prepare_libraries()
    return guarded(lambda: _job(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
