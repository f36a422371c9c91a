"""One price from several runs, whatever their variants and inputs, mixed in log price:

    python -m fusion.ensemble RUN RUN … --output s3://bucket/output
    python -m fusion.ensemble.predict_test --output s3://bucket/output

RUN is the id of a run under --output. All have to have validated on the same rows: with --folds, on all there are; the
fold runs of one recipe (--folds 5 --fold 0 … 4) count as one. The weights are fitted on what each run predicted for
rows that it did not train on, and kept if they are better than equal ones by twice the standard error. What is printed
of them is nested: each row is priced by weights that were fitted without its group of near-duplicates. Fold runs
together are better on new rows than that says, for there each row gets the mean of them all. Needs no GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from fusion import log, storage
from fusion.command import guarded
from fusion.compare.out_of_fold import Scored, same_rows, scored_runs, shared
from fusion.config import A_RUN_ID, RUN_ID
from fusion.ensemble.folder import point_to, publish, record_of
from fusion.ensemble.report import show
from fusion.ensemble.weights import blend
from fusion.environment import variable
from fusion.errors import ConfigError, DataError, ExitCode, Parser, UsageError, filled, seconds
from fusion.records.run import RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT


def _check_members(found: Sequence[Scored], output: str) -> None:
    """Raises an error for runs that lie elsewhere, are ensembles, or validated on other rows than the first."""
    for member in (member for one in found for member in one.members):
        if member.variant == ENSEMBLE_VARIANT:
            raise UsageError(f"{member.run_id} is an ensemble itself", "name the runs that it is made of")
        if member.run != RunFolder.named(output, member.run_id):
            raise UsageError(
                f"{member.run} does not lie in {output}/runs", "name runs under --output, or copy this one there"
            )
    for other in found[1:]:
        if not same_rows(found[0], other):
            raise _other_rows(found[0], other)


def _other_rows(first: Scored, other: Scored) -> DataError:
    return DataError(
        f"{first.name} validated on {len(first.rows)} rows and {other.name} on {len(other.rows)}, of which they share "
        f"{len(shared([first, other]))}",
        "mix runs of one split, or train each with --folds 5, which validates on all rows",
    )


def _warn_of_several_data(found: Sequence[Scored]) -> None:
    wheres = {str(member.settings["data"]) for one in found for member in one.members}
    if len(wheres) > 1:
        log.warning(
            event="several_data", data=", ".join(sorted(wheres)), hint="predict_test needs all sources in --data"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m fusion.ensemble",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.example = "my-run-1 my-run-2 --output s3://my-bucket/output"
    parser.add_argument("runs", metavar="RUN", nargs="+", type=filled("RUN"), help="ids of runs under --output")
    parser.add_argument(
        "--output",
        metavar="URL",
        type=filled("--output"),
        default=variable("FUSION_OUTPUT") or "output",
        help="bucket or folder with runs/, which the ensemble is written to (default: FUSION_OUTPUT, else output)",
    )
    parser.add_argument(
        "--run-id",
        metavar="NAME",
        type=filled("--run-id"),
        help="name of the ensemble (default: made from its members and weights)",
    )
    parser.add_argument("--promote", action="store_true", help="predict with this ensemble from now on")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument(
        "--store-timeout",
        metavar="S",
        type=seconds,
        default=variable("FUSION_STORE_TIMEOUT") or "60",
        help="seconds to retry a store that does not answer (default: 60)",
    )
    arguments = parser.parse_args(argv)
    if arguments.run_id and not re.match(RUN_ID, arguments.run_id):
        raise ConfigError(f"--run-id is {arguments.run_id!r}: expected {A_RUN_ID}", "give --run-id an allowed value")
    return arguments


def _job(arguments: argparse.Namespace) -> ExitCode:
    storage.set_patience(arguments.store_timeout)
    output = arguments.output.rstrip("/") or arguments.output
    found = scored_runs(arguments.runs, output)
    _check_members(found, output)
    _warn_of_several_data(found)
    rows = shared(found)
    mixed = blend(np.log(rows.predicted), np.log(rows.prices), rows.groups)
    record = record_of(arguments.run_id or "", found, rows, mixed)
    if not publish(output, record, found, rows, mixed):
        log.info(event="finished_before", folder=RunFolder.named(output, record.run_id))
    point_to(output, record, promote=arguments.promote)
    if arguments.json:
        sys.stdout.write(storage.as_json(asdict(record)).decode())
    else:
        show(output, record, found, mixed)
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; gives its exit code. `--help` raises SystemExit, as argparse does."""
    return guarded(lambda: _job(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
