"""Checks of one submission: its files, its rows, the folder that it is in, and the model that predicted it."""

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
from fusion.records.manifests import ENSEMBLE, MANIFEST, MODEL, PREDICTIONS, SUBMISSION, Folder
from fusion.records.run import CONFIG, RunFolder
from fusion.records.schemas import CheckpointManifest, DataOfRun, EnsembleRecord, SubmissionManifest, read_required
from fusion.submissions.submission import plain
from fusion.verify.findings import Report, check_comparables, check_files, check_once, first_line, parsed, some

if TYPE_CHECKING:
    import pandas as pd

_PLAIN = re.compile(r"[0-9]+(\.[0-9]+)?")  # a number without sign and exponent
# Errors for which a comparison with another bucket is skipped with a note. An unreachable store is not among them: it
# ends the command with exit code 69.
_NOT_READABLE = (DataError, CredentialsError, ImportError, ValueError)


def check_submission(report: Report, folder: Folder, data: str | None) -> SubmissionManifest | None:
    """Checks a submission's folder; returns its manifest, or None if that is missing or damaged.

    Args:
        data: as for `verify`.
    """
    manifest, contents = check_files(report, folder, SubmissionManifest, {SUBMISSION})
    if manifest is None:
        return None
    _check_path(report, folder, manifest)
    if SUBMISSION in contents:
        content = contents[SUBMISSION]
        report.expect("folder's digest", storage.sha256(content)[:12], folder.name)
        rows = _check_csv(report, content, manifest.rows)
        if PREDICTIONS in contents:
            _check_predictions(report, contents[PREDICTIONS], rows)
        ids = [row[0] if row else "" for row in rows]
        _compare_ids(report, ids, manifest, data)
    _compare_model(report, manifest)
    return manifest


def _check_path(report: Report, folder: Folder, manifest: SubmissionManifest) -> None:
    """Compares date and name with the path of the folder; a copy outside of `submissions/` may have any path."""
    parent, name, date = ["", "", *folder.url.split("/")][-4:-1]
    if parent == "submissions":
        report.expect("date of the manifest", date, manifest.date)
        if manifest.name:  # earlier versions did not write it
            report.expect("name of the manifest", name, manifest.name)


def _check_csv(report: Report, content: bytes, n_rows: int) -> list[list[str]]:
    """Checks header, ids and prices of `submission.csv`; returns its rows as lists of texts."""
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
    """Checks that `predictions.parquet` has the rows of `submission.csv`, and that each price is within its bounds."""
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
        report.bad(PREDICTIONS, f"ids and prices of {SUBMISSION}", "other rows")
    _check_bounds(report, found)
    check_comparables(report, PREDICTIONS, found)


def _check_bounds(report: Report, rows: pd.DataFrame) -> None:
    """Checks the order of the bounds around each price, if there are bounds."""
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
        report.bad(PREDICTIONS, "finite bounds around the price, in order", f"{n_wrong} other rows")
    else:
        report.ok(f"{PREDICTIONS}: prices lie within their bounds")


def _is_price(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and 0 < float(text) < math.inf


def _compare_ids(report: Report, ids: list[str], manifest: SubmissionManifest, data: str | None) -> None:
    """Compares ids and their order with the `test.csv` in `data`, or else the one that the submission was made from."""
    from fusion.data.tables import read_table

    try:
        folder = data or manifest.data or _data_of(manifest.run)
        found = table_sha256(find_table(folder, "test"))
        table = read_table(folder, "test", priced=False, columns=())
    except _NOT_READABLE as error:
        report.note(f"ids not compared: {first_line(error)}")
        return
    if not data and manifest.table_sha256 not in ("", found):
        report.note(f"ids not compared: test.csv in {folder} has changed since; give the old one's folder as --data")
        return
    what, wanted = f"{SUBMISSION}: ids of test.csv in {folder}", list(table.ids[table.file_order])
    if ids == wanted:
        report.ok(f"{what}: all {len(wanted)}, in its order")
    else:
        report.bad(what, f"its {len(wanted)}, in its order", _difference(wanted, ids))


def _data_of(run: str) -> str:
    """URL or folder of the data in the settings of the run; for submissions of earlier versions, which lack it."""
    return read_required(DataOfRun, RunFolder(run).at(CONFIG)).data


def _difference(wanted: Sequence[str], ids: Sequence[str]) -> str:
    """How the ids differ, in words."""
    missing, others = list(set(wanted) - set(ids)), list(set(ids) - set(wanted))
    if not missing and not others:
        return "the same ids, in another order or more than once"
    return f"{len(missing)} missing ({some(missing)}), {len(others)} others ({some(others)})"


def _compare_model(report: Report, manifest: SubmissionManifest) -> None:
    """Compares the model's digest with the checkpoint that the manifest names, if that still exists."""
    if manifest.checkpoint == ENSEMBLE:
        _compare_ensemble(report, manifest)
        return
    folder = RunFolder(manifest.run).checkpoint(manifest.checkpoint)
    data = _read_or_note(report, "model", folder, MANIFEST)
    if data is None:
        return
    made = parsed(report, f"{manifest.checkpoint}/{MANIFEST} of {manifest.run}", data, CheckpointManifest)
    if made is not None:
        report.expect(f"model_sha256, as in {manifest.checkpoint}", made.sha256_of(MODEL), manifest.model_sha256)


def _read_or_note(report: Report, what: str, folder: Folder, name: str) -> bytes | None:
    """Reads a file that a comparison needs; None, with a note that `what` was not compared, if that cannot be."""
    try:
        data = storage.read_if_exists(folder.at(name))
    except _NOT_READABLE as error:
        report.note(f"{what} not compared: {first_line(error)}")
        return None
    if data is None:
        report.note(f"{what} not compared: {folder} no longer exists")
    return data


def _compare_ensemble(report: Report, manifest: SubmissionManifest) -> None:
    """Compares the model's digest with the ensemble that the manifest names, if that still exists."""
    data = _read_or_note(report, "ensemble", RunFolder(manifest.run), ENSEMBLE)
    if data is None:
        return
    record = parsed(report, f"{ENSEMBLE} of {manifest.run}", data, EnsembleRecord)
    if record is not None:
        report.expect(f"model_sha256, as in {ENSEMBLE}", record.model_sha256(), manifest.model_sha256)
