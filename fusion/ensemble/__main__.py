"""Makes an ensemble of runs of any variants and inputs. Its log price is a weighted mean of theirs:

    python -m fusion.ensemble RUN RUN … --output s3://bucket/output
    python -m fusion.ensemble.predict_test --output s3://bucket/output

RUN is the id of a run under --output. All runs have to validate on the same rows; runs with --folds validate on all
rows. The fold runs of one recipe (--folds 5 --fold 0 … 4) count as one run. Weights are fitted on out-of-fold
predictions: those of each run for rows that it did not train on. Fitted weights are used if their SMAPE is lower than
that of equal weights by more than twice the standard error. The printed SMAPE is not biased by the fit, because each
row is predicted with weights that were fitted without its group of near-duplicates. For fold runs it is a pessimistic
estimate: a new row gets the mean of all folds, but a validation row only the prediction of one. Needs no GPU.
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
from fusion.command.parser import add_output, add_store_timeout, command_parser
from fusion.compare.out_of_fold import Scored, same_rows, scored_runs, shared
from fusion.config import A_RUN_ID, RUN_ID
from fusion.ensemble.folder import point_to, publish, record_of
from fusion.ensemble.tables import show
from fusion.ensemble.weights import blend
from fusion.errors import ConfigError, DataError, ExitCode, UsageError, filled
from fusion.records.run import RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT
from fusion.report.publish import report_if_missing


def _check_members(found: Sequence[Scored], output: str) -> None:
    """Raises an error if a run is not under --output, is an ensemble, or validated on other rows than the first run."""
    for member in (member for one in found for member in one.members):
        if member.variant == ENSEMBLE_VARIANT:
            raise UsageError(f"{member.run_id} is itself an ensemble", "name its members instead")
        if member.run != RunFolder.named(output, member.run_id):
            raise UsageError(
                f"{member.run} is not in {output}/runs", "name runs under --output, or copy this run there"
            )
    for other in found[1:]:
        if not same_rows(found[0], other):
            raise _other_rows(found[0], other)


def _other_rows(first: Scored, other: Scored) -> DataError:
    return DataError(
        f"{first.name} validated on {len(first.rows)} rows and {other.name} on {len(other.rows)}, of which they share "
        f"{len(shared([first, other]))}",
        "name runs with the same split, or train each with --folds 5, which validates on all rows",
    )


def _warn_of_several_data(found: Sequence[Scored]) -> None:
    """Warns if the runs were trained on data at different URLs, because a prediction reads all sources from one."""
    urls = {str(member.settings["data"]) for one in found for member in one.members}
    if len(urls) > 1:
        log.warning(
            event="several_data",
            data=", ".join(sorted(urls)),
            hint="copy all sources to one folder, and give it to predict_test with --data",
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    example = "my-run-1 my-run-2 --output s3://my-bucket/output"
    parser = command_parser("python -m fusion.ensemble", __doc__, example)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=filled("RUN"), help="ids of runs under --output")
    add_output(parser, "bucket or folder with runs/, where the ensemble is written too")
    parser.add_argument(
        "--run-id",
        metavar="NAME",
        type=filled("--run-id"),
        help="name of the ensemble (default: ensemble- and a digest of its members and weights)",
    )
    parser.add_argument("--promote", action="store_true", help="predict with this ensemble from now on")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    add_store_timeout(parser)
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
    report_if_missing(RunFolder.named(output, record.run_id))
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
