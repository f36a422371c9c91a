"""Writes reports: each is one HTML page that needs no network and contains no scripts. Prints its URL.

    python -m fusion.report --output s3://bucket/output --run-id all-embeddings-1f2e3d4c
    python -m fusion.report --run-dir runs/all-embeddings-1f2e3d4c
    python -m fusion.report --output s3://bucket/output --compare my-run-1 my-run-2
    python -m fusion.report --output s3://bucket/output --index

Trainings, evaluations, ablations and ensembles write the report of their run by themselves, and `model_card.md` beside
it, which is a part of it as Markdown. The page shows what is in the folder of the run: the score with its interval,
learning curves, errors by group, price intervals, what each source is worth (after `python -m fusion.ablation`), the
worst rows (after evaluate_by_groups), data, settings and lineage. The same run gives the same bytes. The command needs
no GPU and no data.

With --compare, the page shows settings that differ, metrics side by side, paired differences with intervals, learning
curves, and the groups in which the runs differ most; it is `reports/compare-….html` of the output. With --index, it is
`reports/index.html`, a leaderboard of all runs with links to their reports; runs that validated on other rows have a
leaderboard of their own. Both show the runs as they were when the page was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fusion import storage
from fusion.command import guarded
from fusion.command.parser import add_output, add_store_timeout, command_parser
from fusion.environment import prepare_libraries
from fusion.errors import DataError, ExitCode, UsageError, filled
from fusion.records.run import RunFolder


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    example = "--output s3://my-bucket/output --run-id my-run-1"
    parser = command_parser("python -m fusion.report", __doc__, example)
    add_output(parser, "bucket or folder with runs/")
    parser.add_argument("--run-id", metavar="RUN", type=filled("--run-id"), help="id of the run to report")
    parser.add_argument("--run-dir", metavar="URL", type=filled("--run-dir"), help="its folder, in place of --run-id")
    parser.add_argument("--compare", metavar="RUN", nargs="+", type=filled("--compare"), help="runs to compare: ids "
                        "under --output, or URLs of folders; fold runs of one recipe count as one")  # fmt: skip
    parser.add_argument("--index", action="store_true", help="a page over all runs under --output")
    parser.add_argument("--to", metavar="URL", type=filled("--to"), help="file to write the page to (default: "
                        "report.html of the run, or a file in reports/ of --output)")  # fmt: skip
    add_store_timeout(parser)
    return parser.parse_args(argv)


def _job(arguments: argparse.Namespace) -> ExitCode:
    storage.set_patience(arguments.store_timeout)
    given = [flag for flag, value in _what(arguments).items() if value]
    if len(given) != 1:
        found = "none is given" if not given else f"{' and '.join(given)} are given"
        raise UsageError(f"expected one of {', '.join(_what(arguments))}, {found}", "give exactly one of them")
    from fusion.report import publish

    if arguments.compare:
        print(publish.write_comparison(arguments.compare, arguments.output, arguments.to))
    elif arguments.index:
        print(publish.write_index(arguments.output, arguments.to))
    else:
        print(publish.write_report(_run(arguments), arguments.to))
    return ExitCode.DONE


def _what(arguments: argparse.Namespace) -> dict[str, object]:
    """Flag to value of the flags that say what to report."""
    names = ("run_id", "run_dir", "compare", "index")
    return {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names}


def _run(arguments: argparse.Namespace) -> RunFolder:
    from fusion.compare.out_of_fold import find_run

    if arguments.run_id:
        return find_run(arguments.output, arguments.run_id)
    folder = RunFolder(arguments.run_dir.rstrip("/"))
    if not folder.exists():
        raise DataError(f"{folder} has no config.json: it is not the folder of a run", "name one with --run-dir")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; gives its exit code. `--help` raises SystemExit, as argparse does."""
    prepare_libraries()
    return guarded(lambda: _job(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
