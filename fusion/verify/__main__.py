"""Checks that a bucket still holds what was written: recomputes hashes and figures, and compares files with each other.

    python -m fusion.verify s3://bucket/output
    python -m fusion.verify s3://bucket/output/runs/all-embeddings-1f2e3d4c
    python -m fusion.verify s3://bucket/output/pointers/submissions/test/current.json
    python -m fusion.verify s3://bucket/data

URL is an output (the folder with runs/, submissions/ and pointers/), a run, an ensemble, a checkpoint's folder, a
submission's folder, a pointer, or the folder of data or of one source that `fusion.prepare` has written. Each check
prints one line: `ok`, `BAD`, or `note` for something that could not be compared, which is not an error. The last line
is OK with exit code 0, or the number of BAD lines with exit code 65. The command only reads, never executes what it
reads, and needs no GPU.

Every file must match a digest in another file or in itself, and must fit the path that it has in the output. This
finds damage and mistakes, but not a change by somebody who recomputes all digests, because nothing is signed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import fsspec

from fusion import storage
from fusion.command import guarded
from fusion.command.parser import add_store_timeout, command_parser
from fusion.environment import variable
from fusion.errors import DataError, ExitCode, filled
from fusion.records.manifests import MANIFEST
from fusion.records.output import OutputFolder
from fusion.records.run import CONFIG, FACTS, RunFolder
from fusion.terminal.escapes import visible
from fusion.verify.checkpoint import check_checkpoint
from fusion.verify.ensemble import check_ensemble, is_ensemble
from fusion.verify.findings import Finding, Report, read
from fusion.verify.output import check_output, is_output
from fusion.verify.pointers import POINTERS, check_pointer
from fusion.verify.run import check_run
from fusion.verify.source import check_data, check_source, is_source, prepared_sources
from fusion.verify.submission import check_submission

_KINDS = (
    "an output, a run, an ensemble, a checkpoint or submission folder, a pointer such as current.json, prepared data"
)


def verify(url: str, data: str | None = None, say: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
    """Checks an output, a run, an ensemble, a checkpoint, a submission, or a pointer and what it names.

    Args:
        url: what to check; its kind is recognised from the files that it contains.
        data: folder or bucket with the `test.csv` that a submission's ids are compared with; by default the one that it
            was predicted from.
        say: called with each finding as soon as it is made.

    Returns:
        All findings, in order.

    Raises:
        DataError: `url` does not exist, or is not one of these kinds.
        CredentialsError, UnreachableError: as for `fusion.storage.read`.
    """
    folder, report = RunFolder(url.rstrip("/")), Report(say)
    url, is_document = folder.url, url.endswith(".json")
    manifest = None if is_document else read(folder.manifest_url)
    if is_document and POINTERS in url and storage.exists(url):
        check_pointer(report, url, data)
    elif manifest is not None and b'"rows"' in manifest:  # only the manifest of a submission has this key
        check_submission(report, folder, data)
    elif not is_document and is_ensemble(folder, manifest):
        check_ensemble(report, folder)
    elif manifest is not None:
        check_checkpoint(report, folder)
    elif any(storage.exists(folder.at(name)) for name in (CONFIG, FACTS)):
        check_run(report, folder)
    elif not is_document and is_output(OutputFolder(url)):
        check_output(report, OutputFolder(url), data)
    elif not is_document and is_source(url):
        check_source(report, folder)
    elif not is_document and prepared_sources(url):
        check_data(report, url)
    else:
        raise DataError(f"{url} does not exist, or has neither {MANIFEST} nor config.json", f"name {_KINDS}")
    return report.findings


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m fusion.verify", __doc__, "s3://my-bucket/output")
    parser.add_argument("url", metavar="URL", type=filled("URL"), help=f"{_KINDS}; a path or an fsspec URL")
    parser.add_argument(
        "--data",
        type=filled("--data"),
        default=variable("FUSION_DATA"),
        help="bucket or folder whose test.csv a submission was predicted from (default: the one in its manifest)",
    )
    add_store_timeout(parser)
    arguments = parser.parse_args(argv)
    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(arguments.url))
    except (ValueError, ImportError) as error:
        parser.error(f"{arguments.url} is not a usable URL ({error})")
    return arguments


def _job(arguments: argparse.Namespace) -> ExitCode:
    storage.set_patience(arguments.store_timeout)
    found = verify(arguments.url, arguments.data, say=lambda finding: print(visible(str(finding)), flush=True))
    n_wrong = sum(finding.verdict == "BAD" for finding in found)
    if not n_wrong:
        print("OK")
        return ExitCode.DONE
    print("1 thing is wrong" if n_wrong == 1 else f"{n_wrong} things are wrong")
    return ExitCode.DATA


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv` and returns its exit code. `--help` raises SystemExit, as in argparse."""
    return guarded(lambda: _job(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
