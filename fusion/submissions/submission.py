"""Publishes a submission: the prices of one night, in an immutable folder, and a pointer to the current one.

    submissions/<name>/<date>/<digest>/   submission.csv, predictions.parquet, fingerprints.parquet, MANIFEST.json
    pointers/submissions/<name>/current.json

A submission records its origin: the model, the input files and the code that it was made from. If a submission of the
same origin exists, it is reused instead of predicting again. This module does not import torch, so that a night on
which nothing has changed takes seconds and needs no GPU.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd

from fusion import log, storage
from fusion.config import PredictConfig, RunConfig, digest
from fusion.data.inputs import Inputs, find_inputs, table_sha256
from fusion.errors import DivergedError
from fusion.records import manifests, pointers, schemas
from fusion.records.manifests import FINGERPRINTS, INTERVALS, SUBMISSION, Folder
from fusion.records.output import OutputFolder, key_of
from fusion.records.provenance import code_digest
from fusion.records.run import RunFolder
from fusion.records.schemas import SCHEMA, Night, SubmissionManifest, SubmissionPointer, seal

# Dollars. Prices from here on are written with four decimals, smaller ones with six significant digits: of a price
# below a cent, four decimals would keep at most two significant digits.
SMALLEST_IN_CENTS = 0.01


@dataclass(frozen=True)
class Origin:
    """What a submission is made from: model, inputs and code. It is known before anything is computed.

    Attributes:
        run: URL of the run that predicts.
        checkpoint: name of its checkpoint.
        data: URL or folder of the input.
        table_sha256: of the bytes of `test.csv`.
        inputs_sha256: of `table_sha256` and the versions of all embeddings.
        code_sha256: of the code that computes prices.
        run_data, sources, inputs_version: as in `SubmissionManifest`.
        intervals_sha256: of the checkpoint's intervals; empty if it has none.
    """

    run: str
    checkpoint: str
    model_sha256: str
    data: str
    table_sha256: str
    inputs_sha256: str
    code_sha256: str
    run_data: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    inputs_version: str = ""
    intervals_sha256: str = ""

    def key(self) -> str:
        """Digest of model, data and code; it does not depend on the URLs that they are read from."""
        return digest([self.model_sha256, self.intervals_sha256, self.inputs_sha256, self.code_sha256])

    def same_as(self, made: Origin | SubmissionManifest) -> bool:
        """Whether `made` has the same model, intervals, inputs and code as this origin."""
        compared = ("model_sha256", "intervals_sha256", "inputs_sha256", "code_sha256")
        return all(getattr(made, name) == getattr(self, name) for name in compared)


@dataclass(frozen=True)
class SubmissionContent:
    """The content of a submission that is not published yet.

    Attributes:
        files: name to content, without the manifest.
        rows: number of prices.
        smape: of the model on its validation rows, in %; None if unknown.
        history: how prices changed in the last nights, oldest first.
    """

    files: Mapping[str, bytes]
    rows: int
    smape: float | None
    history: list[Night]


@dataclass(frozen=True)
class CommittedSubmission(Folder):
    """A submission that was published: its folder and its manifest."""

    manifest: SubmissionManifest

    def read_whole(self, name: str) -> bytes | None:
        """Content of a file; None, with a warning, if it is missing or its sha256 is not the manifest's."""
        url = self.at(name)
        content = storage.read_if_exists(url)
        if content is not None and storage.sha256(content) == self.manifest.sha256_of(name):
            return content
        log.warning(event="submission_damaged", submission=url, reason="missing, or its sha256 is not the manifest's")
        return None

    def is_whole(self) -> bool:
        """Whether all files that the manifest lists exist and are not damaged."""
        return all(self.read_whole(entry.key) is not None for entry in self.manifest.files)


@dataclass(frozen=True)
class LastSubmission:
    """The submission that is current before a night, with which the night is compared.

    Attributes:
        prices: dollars, indexed by sample_id.
        prints: fingerprints of its embeddings, as in `EmbeddingStatistics`; None if they are missing or damaged.
    """

    manifest: SubmissionManifest
    prices: pd.Series
    prints: pd.DataFrame | None


def origin_of(
    run: RunFolder,
    chosen: manifests.Checkpoint,
    config: RunConfig,
    data: str,
    split: str = "test",
    found: Inputs | None = None,
) -> Origin:
    """The origin of predictions by this checkpoint.

    Args:
        chosen: the checkpoint that predicts.
        config: settings of its run.
        data: URL or folder of the input.
        split: the table to predict, "test" or "train".
        found: the input files, if the caller has listed them already.

    Raises:
        DataError: the table or a source of the split does not exist.
    """
    found = found or find_inputs(data, split, config.bindings())
    table = table_sha256(found.table)
    return Origin(
        run.url,
        chosen.name,
        chosen.model_sha256,
        data,
        table,
        digest([table, found.sources_digest()]),
        code_digest(),
        config.data,
        config.bindings(),
        found.version(),
        chosen.manifest.sha256_of(INTERVALS),
    )


def reuse(settings: PredictConfig, origin: Origin) -> str | None:
    """Publishes an existing submission of the same origin for this date, and returns its URL; None if there is none.

    Submissions of this date and the current one are considered. If the current one has another date, its files are
    published again under this date.
    """
    current = _current(settings)
    for found in _candidates(settings, current):
        content = found.read_whole(SUBMISSION) if origin.same_as(found.manifest) else None
        if content is None:
            continue
        if found == current and _is_of(settings, found.manifest):  # it is current already: nothing to do
            return published_before(found)
        return publish(settings, origin, _content(found, content), current)
    return None


def _candidates(settings: PredictConfig, current: CommittedSubmission | None) -> Iterator[CommittedSubmission]:
    """The submissions that `reuse` considers: those of this date, and the current one.

    The current one comes first unless it has a later date. It usually has the same origin, and then the folder of this
    date does not have to be listed.
    """
    if current is not None and current.manifest.date <= settings.day():
        yield current
    for folder in OutputFolder(settings.output).submissions(settings.name, settings.day()):
        found = open_submission(folder)
        if found is not None and found != current:
            yield found
    if current is not None and current.manifest.date > settings.day():
        yield current


def _content(found: CommittedSubmission, submission: bytes) -> SubmissionContent:
    """The content of a committed submission, without damaged files.

    Args:
        submission: content of its `submission.csv`.
    """
    manifest = found.manifest
    others = {entry.key: found.read_whole(entry.key) for entry in manifest.files if entry.key != SUBMISSION}
    whole = {name: content for name, content in others.items() if content is not None}
    return SubmissionContent({SUBMISSION: submission, **whole}, manifest.rows, manifest.smape, manifest.history)


def published_before(found: CommittedSubmission) -> str:
    """Logs that a submission exists already, and returns its URL."""
    url = found.at(SUBMISSION)
    log.info(event="published_before", rows=found.manifest.rows, submission=url)
    return url


def _current(settings: PredictConfig) -> CommittedSubmission | None:
    """The current submission; None if there is none, or it is damaged."""
    output = OutputFolder(settings.output)
    pointer = output.current(settings.name)
    return open_submission(output.submission(pointer.submission)) if pointer else None


def open_submission(folder: Folder) -> CommittedSubmission | None:
    """The submission in a folder; None if it is not committed, or, with a warning, if its manifest is damaged.

    It only warns, because a damaged manifest must not prevent all later submissions.
    """
    manifest = schemas.read_if_whole(SubmissionManifest, folder.manifest_url, "submission_damaged")
    return CommittedSubmission(folder.url, manifest) if manifest else None


def publish(settings: PredictConfig, origin: Origin, content: SubmissionContent, current: Folder | None = None) -> str:
    """Commits the submission under its date, makes it current unless one of a later date is, and returns its URL.

    If the same submission was published before, its folder stays as it is; damaged files in it are written again.

    Args:
        current: the submission that is current, if the caller knows it.
    """
    key = f"{settings.name}/{settings.day()}/{storage.sha256(content.files[SUBMISSION])[:12]}"
    folder = OutputFolder(settings.output).submission(key)
    existing = {entry.name for entry in folder.ls()}
    before = _same_publication(settings, origin, folder) if manifests.MANIFEST in existing else None
    # Whole files are kept rather than replaced by newly computed ones: another kind of processor may compute values
    # that differ from them in digits that the prices in `submission.csv` do not show.
    if before is None or not before.is_whole():
        _write_missing_or_damaged(folder, content.files, existing)
        if before is None or before.manifest.files != manifests.entries(content.files):
            _commit(folder, _manifest(settings, origin, content, _previous(settings, key, current)))
    url = folder.at(SUBMISSION)
    log.info(event="published_before" if before else "published", rows=content.rows, submission=url)
    point_to(settings, key)
    return url


def _manifest(settings: PredictConfig, origin: Origin, content: SubmissionContent, previous: str) -> SubmissionManifest:
    return SubmissionManifest(
        SCHEMA,
        manifests.entries(content.files),
        rows=content.rows,
        date=settings.day(),
        smape=content.smape,
        history=content.history,
        name=settings.name,
        previous=previous,
        **asdict(origin),
    )


def _commit(folder: Folder, manifest: SubmissionManifest) -> None:
    url, data = folder.manifest_url, seal(asdict(manifest))
    if not storage.create(url, data):  # there is a damaged manifest, or one of another origin with the same prices
        storage.write(url, data)


def point_to(settings: PredictConfig, key: str, seen: tuple[bytes, str] | None = None) -> None:
    """Makes a submission the current one, unless the current one has a later date; then logs a warning.

    Args:
        key: `<name>/<date>/<digest>` of the submission.
        seen: the pointer as the caller read it a moment ago, which saves a request.
    """
    is_current = pointers.move(
        settings.output,
        *("submissions", settings.name, "current"),
        target=SubmissionPointer(key),
        unless=lambda current: current.date > settings.day(),
        seen=seen,
    )
    if not is_current:
        log.warning(event="not_current", date=settings.day(), reason="a submission of a later date is current")


def _write_missing_or_damaged(folder: Folder, files: Mapping[str, bytes], existing: Collection[str]) -> None:
    """Writes the files that do not exist with this content.

    Args:
        existing: names of the files in the folder; only these are read and compared.
    """
    for name, content in files.items():
        if name not in existing or storage.read_if_exists(folder.at(name)) != content:
            manifests.write_files(folder, {name: content})


def _same_publication(settings: PredictConfig, origin: Origin, folder: Folder) -> CommittedSubmission | None:
    """The submission in a folder, if it has this origin, name and date; else None."""
    found = open_submission(folder)
    return found if found and origin.same_as(found.manifest) and _is_of(settings, found.manifest) else None


def _is_of(settings: PredictConfig, manifest: SubmissionManifest) -> bool:
    """Whether the manifest has this name and date; earlier versions wrote no name."""
    return manifest.date == settings.day() and manifest.name in ("", settings.name)


def _previous(settings: PredictConfig, key: str, current: Folder | None) -> str:
    """`<name>/<date>/<digest>` of the submission that is current before `key` is published; empty if there is none."""
    if current is not None:
        before = key_of(current)
    else:
        pointer = OutputFolder(settings.output).current(settings.name)
        before = pointer.submission if pointer else ""
    return before if before != key else ""


def submission_csv(ids: Sequence[str], prices: np.ndarray) -> bytes:
    """The content of `submission.csv`: a header and `sample_id,price` per row, in the given order.

    Raises:
        DivergedError: a price is not finite or not above 0, as happens if the model's weights are not finite.
    """
    wrong = ~(np.isfinite(prices) & (prices > 0))
    if wrong.any():
        # Cut to 80 characters, which shows the first few and keeps the message on one line.
        first = ", ".join(f"{sample_id} ({prices[i]})" for i, sample_id in enumerate(ids) if wrong[i])[:80]
        raise DivergedError(
            f"{int(wrong.sum())} predicted prices are not finite numbers above 0, the first: {first}",
            "train the model again, or predict with another --run-id; nothing was published",
        )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["sample_id", "price"])
    # As Python floats, because formatting NumPy floats takes three times as long.
    writer.writerows((sample_id, plain(price)) for sample_id, price in zip(ids, prices.tolist(), strict=True))
    return buffer.getvalue().encode()


def plain(price: float) -> str:
    """The price with four decimals or, below a cent, with six significant digits; never with an exponent.

    >>> plain(12.34567), plain(0.00001234567)
    ('12.3457', '0.0000123457')
    """
    if price >= SMALLEST_IN_CENTS:
        return f"{price:.4f}"
    return np.format_float_positional(price, precision=6, unique=False, fractional=False, trim="-")


def last_submission(settings: PredictConfig) -> LastSubmission | None:
    """The current submission under this name; None if there is none, or it is damaged."""
    found = _current(settings)
    content = found.read_whole(SUBMISSION) if found else None
    if found is None or content is None:
        return None
    frame = pd.read_csv(io.BytesIO(content), dtype={"sample_id": "str"}, keep_default_na=False)
    return LastSubmission(found.manifest, frame.set_index("sample_id")["price"], _prints(found))


def _prints(found: CommittedSubmission) -> pd.DataFrame | None:
    """Fingerprints of a submission; None if it has none, or they are damaged."""
    if not found.manifest.sha256_of(FINGERPRINTS):  # an earlier version made the submission
        return None
    content = found.read_whole(FINGERPRINTS)
    if content is None:
        return None
    frame = pd.read_parquet(io.BytesIO(content))
    return frame.set_index(frame.pop("sample_id").astype("str"))
