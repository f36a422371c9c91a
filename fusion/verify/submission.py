"""Checks of one submission: its file, its rows, where it lies, and the model that it says it was made with."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusion import storage
from fusion.data.inputs import find_table, table_sha256
from fusion.errors import CredentialsError, DataError
from fusion.records.manifests import ENSEMBLE, MANIFEST, MODEL, PREDICTIONS, SUBMISSION
from fusion.records.run import CONFIG, RunFolder
from fusion.records.schemas import CheckpointManifest, DataOfRun, EnsembleRecord, SubmissionManifest, read_required
from fusion.submissions.submission import plain
from fusion.verify.findings import Report, check_comparables, check_files, check_once, first_line, parsed, some

if TYPE_CHECKING:
    import pandas as pd

_PLAIN = re.compile(r"[0-9]+(\.[0-9]+)?")
_NOT_READABLE = (DataError, CredentialsError, ImportError, ValueError)  # not: a store that is silent, which is 69


def check_submission(report: Report, folder: str, data: str | None) -> SubmissionManifest | None:
    """Checks a submission's folder; its manifest, if it is one.

    Args:
        data: folder or bucket whose `test.csv` has its ids; None: the one that it was made from.
    """
    manifest, contents = check_files(report, folder, SubmissionManifest, {SUBMISSION})
    if manifest is None:
        return None
    _check_place(report, folder, manifest)
    if SUBMISSION in contents:
        content = contents[SUBMISSION]
        report.expect("folder's digest", storage.sha256(content)[:12], storage.base(folder))
        rows = _check_csv(report, content, manifest.rows)
        if PREDICTIONS in contents:
            _check_predictions(report, contents[PREDICTIONS], rows)
        ids = [row[0] if row else "" for row in rows]
        _compare_ids(report, ids, manifest, data)
    _compare_model(report, manifest)
    return manifest


def _check_place(report: Report, folder: str, manifest: SubmissionManifest) -> None:
    """Whether it lies under its own date and name, unless it is a copy that lies elsewhere."""
    place, name, date = ["", "", *folder.split("/")][-4:-1]
    if place == "submissions":
        report.expect("date of the manifest", date, manifest.date)
        if manifest.name:  # earlier versions did not say
            report.expect("name of the manifest", name, manifest.name)


def _check_csv(report: Report, content: bytes, n_rows: int) -> list[list[str]]:
    """Checks header, rows and prices of a submission; its rows."""
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
    return rows


def _check_predictions(report: Report, data: bytes, rows: list[list[str]]) -> None:
    """Whether these are the rows of `submission.csv`, and each price lies within its intervals."""
    from fusion.submissions.predictions import from_parquet

    try:
        found = from_parquet(data)
    except ValueError as error:
        report.bad(PREDICTIONS, "Parquet with sample_id and price", first_line(error))
        return
    same = zip(found["sample_id"].tolist(), map(plain, found["price"].tolist()), strict=True)
    if [[*row] for row in same] == rows:
        report.ok(f"{PREDICTIONS}: ids and prices of {SUBMISSION}")
    else:
        report.bad(PREDICTIONS, f"ids and prices of {SUBMISSION}", "others")
    _check_bounds(report, found)
    check_comparables(report, PREDICTIONS, found)


def _check_bounds(report: Report, rows: pd.DataFrame) -> None:
    from fusion.records.intervals import misplaced

    if not any(str(name).startswith("low_") for name in rows):
        report.note(f"{PREDICTIONS}: no intervals")
        return
    try:
        n_wrong = misplaced(rows, "price")
    except (KeyError, ValueError) as error:
        report.bad(PREDICTIONS, "both bounds of each interval", first_line(error))
        return
    if n_wrong:
        report.bad(PREDICTIONS, "finite bounds, the wider ones further from the price", f"{n_wrong} other rows")
    else:
        report.ok(f"{PREDICTIONS}: prices lie within their bounds")


def _is_price(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and 0 < float(text) < math.inf


def _compare_ids(report: Report, ids: list[str], manifest: SubmissionManifest, data: str | None) -> None:
    """Compares with the ids of the `test.csv` it was made from, or of the one in `data`, in their order."""
    from fusion.data.tables import read_table

    try:
        where = data or manifest.data or _data_of(manifest.run)
        found = table_sha256(find_table(where, "test"))
        table = read_table(where, "test", priced=False, columns=())
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
    return read_required(DataOfRun, RunFolder(run).at(CONFIG)).data


def _difference(wanted: Sequence[str], ids: Sequence[str]) -> str:
    missing, others = list(set(wanted) - set(ids)), list(set(ids) - set(wanted))
    if not missing and not others:
        return "the same ids, in another order or more than once"
    return f"{len(missing)} missing ({some(missing)}), {len(others)} others ({some(others)})"


def _compare_model(report: Report, manifest: SubmissionManifest) -> None:
    if manifest.checkpoint == ENSEMBLE:
        _compare_ensemble(report, manifest)
        return
    folder = RunFolder(manifest.run).checkpoint_url(manifest.checkpoint)
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


def _compare_ensemble(report: Report, manifest: SubmissionManifest) -> None:
    try:
        data = storage.read_if_exists(RunFolder(manifest.run).at(ENSEMBLE))
    except _NOT_READABLE as error:
        report.note(f"ensemble not compared: {first_line(error)}")
        return
    if data is None:
        report.note(f"ensemble not compared: {manifest.run} is no longer there")
        return
    record = parsed(report, f"{ENSEMBLE} of {manifest.run}", data, EnsembleRecord)
    if record is not None:
        report.expect(f"model_sha256, as in {ENSEMBLE}", record.model_sha256(), manifest.model_sha256)
