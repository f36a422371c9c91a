"""Checks that what lies in the bucket is what was written: hashes, schemas, lineage and content, all recomputed.

    python -m fusion.verify s3://bucket/output/runs/all-embeddings-1f2e3d4c
    python -m fusion.verify s3://bucket/output/pointers/submissions/test/current.json

URL is a run, one of its checkpoint folders, a submission's folder, or the pointer to a submission. One line for each
thing that was checked, `ok` or `BAD`; a `note` says what could not be compared, and is no error. The last line is OK or
how many things are wrong, the exit code 0 or 65. It only reads, executes nothing of what it reads, and needs no GPU.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import fsspec
from pydantic import PositiveInt, TypeAdapter

from fusion import storage
from fusion.command import guarded
from fusion.errors import CredentialsError, DataError, ExitCode, Parser, seconds
from fusion.findings import Finding, Report, check_files, check_once, first_line, parsed, read, some
from fusion.inputs import find_table
from fusion.manifests import MANIFEST, MODEL, SPLIT, STATE, SUBMISSION
from fusion.records import (
    CheckpointManifest,
    DataOfRun,
    Manifest,
    RunFacts,
    SubmissionManifest,
    SubmissionPointer,
    read_required,
)
from fusion.runs import config_digest

_POINTERS = "pointers/submissions/"
_PLAIN = re.compile(r"[0-9]+(\.[0-9]+)?")
_KINDS = "a run, a checkpoint folder, a submission folder, or pointers/submissions/<name>/current.json"
_NOT_READABLE = (DataError, CredentialsError, ImportError, ValueError)  # not: a store that is silent, which is 69


def verify(url: str, data: str | None = None, say: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
    """All findings about a run, a checkpoint, a submission or the submission that a pointer names.

    Args:
        data: folder or bucket whose `test.csv` has a submission's ids; by default the one its run was trained from.
        say: told each finding as it is made.

    Raises:
        DataError: there is no such thing at `url`.
        CredentialsError, UnreachableError: as for `fusion.storage.read`.
    """
    url, report = url.rstrip("/"), Report(say)
    manifest = None if url.endswith(".json") else read(storage.join(url, MANIFEST))
    if url.endswith(".json") and _POINTERS in url and storage.exists(url):
        _check_pointer(report, url, data)
    elif manifest is not None and b'"rows"' in manifest:
        _check_submission(report, url, data)
    elif manifest is not None:
        _check_checkpoint(report, url)
    elif any(storage.exists(storage.join(url, name)) for name in ("config.json", "run.json")):
        _check_run(report, url)
    else:
        raise DataError(f"{url} does not exist, or has neither {MANIFEST} nor config.json", f"name {_KINDS}")
    return report.findings


def _check_pointer(report: Report, url: str, data: str | None) -> None:
    output, _, rest = url.rpartition(_POINTERS)
    pointer = parsed(report, rest, read(url), SubmissionPointer)
    if pointer is None:
        return
    report.expect(f"{rest}: name of the submission", rest.split("/")[0], pointer.submission.split("/")[0])
    _check_submission(report, f"{output}submissions/{pointer.submission}", data)


def _check_run(report: Report, url: str) -> None:
    settings = read(storage.join(url, "config.json"))
    config = parsed(report, "config.json", settings, DataOfRun)
    facts = parsed(report, "run.json", read(storage.join(url, "run.json")), RunFacts)
    if settings and config and facts:
        report.expect(
            "config.json: config_sha256 of run.json", facts.config_sha256, config_digest(json.loads(settings))
        )
    split = read(storage.join(url, SPLIT))
    _check_split(report, split)
    folders = storage.ls(storage.join(url, "checkpoints"))
    committed = [folder for folder in folders if storage.exists(storage.join(folder, MANIFEST))]
    for folder in folders:
        if folder in committed:
            _check_checkpoint_of_run(report, folder, facts, split)
        else:
            report.note(f"{storage.base(folder)}: not committed, so it does not count")
    if not committed:
        report.note("no committed checkpoint")
    if storage.exists(storage.join(url, "metrics", MANIFEST)):
        check_files(report, storage.join(url, "metrics"), Manifest, set())


def _check_checkpoint_of_run(report: Report, folder: str, facts: RunFacts | None, split: bytes | None) -> None:
    part = Report(lambda _: None)
    manifest = _check_checkpoint(part, folder)
    if manifest is not None and manifest.split_sha256 and split is not None:
        part.expect(
            f"{storage.base(folder)}: split_sha256 of split.parquet", storage.sha256(split), manifest.split_sha256
        )
    if manifest is not None and facts is not None:
        for name in ("config_sha256", "data_sha256"):
            part.expect(f"{storage.base(folder)}: {name} of run.json", getattr(facts, name), getattr(manifest, name))
    if part.n_wrong and not storage.exists(storage.join(folder, MANIFEST)):
        report.note(f"{storage.base(folder)}: removed while it was read")
    else:
        report.add(*part.findings)


def _check_checkpoint(report: Report, folder: str) -> CheckpointManifest | None:
    name = storage.base(folder)
    manifest, contents = check_files(report, folder, CheckpointManifest, {MODEL, STATE})
    if manifest is not None and name.startswith("step-"):
        report.expect(f"{name}: step of the manifest", name, f"step-{manifest.step:08d}")
    if MODEL in contents:
        _check_header(report, f"{name}/{MODEL}", contents[MODEL])
    return manifest


def _check_header(report: Report, what: str, data: bytes) -> None:
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(data)  # type: ignore[no-untyped-call]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # its length comes first
        dims = TypeAdapter(dict[str, PositiveInt]).validate_json(header["__metadata__"]["dims"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        report.bad(f"{what}: header", "tensors, and in its metadata the dims of every role", first_line(error))
        return
    report.ok(f"{what}: {len(tensors)} tensors, dims {', '.join(f'{role} {dim}' for role, dim in dims.items())}")


def _check_split(report: Report, data: bytes | None) -> None:
    import pandas as pd
    from pyarrow import ArrowException

    if data is None:
        report.bad("split.parquet", "sample_id and side", "no such file")
        return
    try:
        split = pd.read_parquet(io.BytesIO(data), columns=["sample_id", "side"])
    except (ArrowException, ValueError, OSError) as error:
        report.bad("split.parquet", "Parquet with sample_id and side", first_line(error))
        return
    sides = Counter(map(str, split["side"]))
    if set(sides) == {"train", "validation"}:
        report.ok(f"split.parquet: {sides['train']} rows train, {sides['validation']} validate")
    else:
        report.bad("split.parquet: sides", "train and validation", " and ".join(sorted(sides)) or "no rows")
    check_once(report, "split.parquet: ids", list(map(str, split["sample_id"])))


def _check_submission(report: Report, folder: str, data: str | None) -> None:
    manifest, contents = check_files(report, folder, SubmissionManifest, {SUBMISSION})
    if manifest is None:
        return
    if SUBMISSION in contents:
        content = contents[SUBMISSION]
        report.expect("folder's digest", storage.sha256(content)[:12], storage.base(folder))
        ids = _check_csv(report, content, manifest.rows)
        _compare_ids(report, ids, manifest, data)
    _compare_model(report, manifest)


def _check_csv(report: Report, content: bytes, n_rows: int) -> list[str]:
    """Checks header, rows and prices of a submission; its ids."""
    try:
        header, *rows = [*csv.reader(io.StringIO(content.decode(), newline=""), strict=True)] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        report.bad(SUBMISSION, "CSV in UTF-8", first_line(error))
        return []
    report.expect(f"{SUBMISSION}: header", "sample_id,price", ",".join(header))
    report.expect(f"{SUBMISSION}: rows", n_rows, len(rows))
    ids = [row[0] if row else "" for row in rows]
    check_once(report, f"{SUBMISSION}: ids", ids)
    wrong = [",".join(row) for row in rows if len(row) != 2 or not _is_price(row[1])]
    if wrong:
        report.bad(f"{SUBMISSION}: prices", "plain finite numbers above 0", f"{len(wrong)} others: {some(wrong)}")
    else:
        report.ok(f"{SUBMISSION}: prices are plain finite numbers above 0")
    return ids


def _is_price(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and 0 < float(text) < math.inf


def _compare_ids(report: Report, ids: list[str], manifest: SubmissionManifest, data: str | None) -> None:
    """Compares with the ids of the `test.csv` it was made from, or of the one in `data`, in their order."""
    from fusion.tables import read_table

    try:
        where = data or manifest.data or _data_of(manifest.run)
        found = storage.sha256(storage.read(find_table(where, "test").url))
        table = read_table(where, "test", priced=False)
    except _NOT_READABLE as error:
        report.note(f"ids not compared: {first_line(error)}")
        return
    if not data and manifest.table_sha256 not in ("", found):
        report.note(f"ids not compared: test.csv in {where} has changed since; --data names a folder with the old one")
        return
    what, wanted = f"{SUBMISSION}: ids of test.csv in {where}", list(table.ids[table.file_order])
    if ids == wanted:
        report.ok(f"{what}: all {len(wanted)}, in its order")
    else:
        report.bad(what, f"its {len(wanted)}, in its order", _difference(wanted, ids))


def _data_of(run: str) -> str:
    return read_required(DataOfRun, storage.join(run, "config.json")).data


def _difference(wanted: Sequence[str], ids: Sequence[str]) -> str:
    missing, others = list(set(wanted) - set(ids)), list(set(ids) - set(wanted))
    if not missing and not others:
        return "the same ids, in another order or more than once"
    return f"{len(missing)} missing ({some(missing)}), {len(others)} others ({some(others)})"


def _compare_model(report: Report, manifest: SubmissionManifest) -> None:
    folder = storage.join(manifest.run, "checkpoints", manifest.checkpoint)
    try:
        data = storage.read_if_exists(storage.join(folder, MANIFEST))
    except _NOT_READABLE as error:
        report.note(f"model not compared: {first_line(error)}")
        return
    if data is None:
        report.note(f"model not compared: {folder} is no longer there")
        return
    made = parsed(report, f"{manifest.checkpoint}/{MANIFEST} of {manifest.run}", data, CheckpointManifest)
    if made is not None:
        report.expect(f"model_sha256, as in {manifest.checkpoint}", made.sha256_of(MODEL), manifest.model_sha256)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m fusion.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    environment = os.environ.get
    parser.add_argument("url", metavar="URL", help=f"{_KINDS}; a path or an fsspec URL")
    parser.add_argument(
        "--data",
        default=environment("FUSION_DATA"),
        help="bucket or folder whose test.csv a submission was made for (default: that of its run)",
    )
    parser.add_argument(
        "--store-timeout",
        metavar="S",
        type=seconds,
        default=environment("FUSION_STORE_TIMEOUT", "60"),
        help="seconds to retry a store that does not answer (default: 60)",
    )
    arguments = parser.parse_args(argv)
    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(arguments.url))
    except (ValueError, ImportError) as error:
        parser.error(f"{arguments.url} is no usable URL ({error})")
    return arguments


def _job(arguments: argparse.Namespace) -> ExitCode:
    storage.set_patience(arguments.store_timeout)
    found = verify(arguments.url, arguments.data, say=lambda finding: print(finding, flush=True))
    n_wrong = sum(finding.verdict == "BAD" for finding in found)
    print(f"{n_wrong} thing{'s are' if n_wrong > 1 else ' is'} wrong" if n_wrong else "OK")
    return ExitCode.DATA if n_wrong else ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; gives its exit code. `--help` raises SystemExit, as argparse does."""
    return guarded(lambda: _job(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
