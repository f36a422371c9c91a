"""A submission: what it is made of, whether it is there already, whether it may be published, and its publication.

Nothing here loads torch: a night on which nothing has changed costs seconds, and no GPU.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import numpy as np
import pandas as pd

from fusion import log, storage
from fusion.config import PredictConfig, RunConfig, digest
from fusion.data.inputs import Inputs, find_inputs, table_sha256
from fusion.errors import DivergedError
from fusion.records import manifests, pointers, schemas
from fusion.records.manifests import FINGERPRINTS, INTERVALS, MANIFEST, SUBMISSION
from fusion.records.provenance import code_digest
from fusion.records.run import RunFolder
from fusion.records.schemas import SCHEMA, Night, SubmissionManifest, SubmissionPointer, seal

C = TypeVar("C", bound=RunConfig)
T = TypeVar("T")

SMALLEST_IN_CENTS = 0.01  # dollars; four decimals would leave less than two digits of a smaller price


@dataclass(frozen=True)
class Origin:
    """What a submission is made of, known before anything is computed.

    Attributes:
        data: URL of the input.
        table_sha256: of the bytes of `test.csv`.
        inputs_sha256: of `table_sha256` and the versions of all embeddings.
        code_sha256: of the code that decides a price.
        run_data, sources, inputs_version: as in `SubmissionManifest`.
        intervals_sha256: of the checkpoint's intervals; empty: it has none.
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
        """The same for the same model, data and code, wherever they lie."""
        return digest([self.model_sha256, self.intervals_sha256, self.inputs_sha256, self.code_sha256])

    def same_as(self, made: Origin | SubmissionManifest) -> bool:
        """Whether the other, or a submission with this manifest, was made of the same model, data and code."""
        compared = ("model_sha256", "intervals_sha256", "inputs_sha256", "code_sha256")
        return all(getattr(made, name) == getattr(self, name) for name in compared)


@dataclass(frozen=True)
class Made:
    """A submission before it is published.

    Attributes:
        files: name to content; the last that is written is committed by the manifest.
        smape: of the model on its validation rows, in %.
        history: what earlier nights did to prices.
    """

    files: Mapping[str, bytes]
    rows: int
    smape: float | None
    history: list[Night]


@dataclass(frozen=True)
class Last:
    """The submission that is current: prices by sample_id, and the fingerprints of its embeddings where it has them."""

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
    """What predictions of a split are made of; `found` are its inputs, if they are known.

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
    """URL of the submission of this date, if one of the same origin is there or is current; else None.

    The current one is published again under this date if it bears another.
    """
    current = _current(settings)
    for folder, manifest in _candidates(settings, current):
        content = read_verified(folder, manifest, SUBMISSION) if origin.same_as(manifest) else None
        if content is None:
            continue
        if current == (folder, manifest) and _is_of(settings, manifest):  # nothing is left to do
            return published_before(folder, manifest.rows)
        return publish(settings, origin, _made(folder, manifest, content), current[0] if current else None)
    return None


def _candidates(
    settings: PredictConfig, current: tuple[str, SubmissionManifest] | None
) -> Iterator[tuple[str, SubmissionManifest]]:
    """Committed submissions that may be the one wanted, with their manifests: those of its date, and the current.

    The current one comes first where it is not of a later date: mostly it is the one, and there is nothing to list.
    """
    if current is not None and current[1].date <= settings.day():
        yield current
    for folder in storage.ls(storage.join(settings.output, "submissions", settings.name, settings.day())):
        manifest = _whole(SubmissionManifest, storage.join(folder, MANIFEST))
        if manifest is not None and (folder, manifest) != current:
            yield folder, manifest
    if current is not None and current[1].date > settings.day():
        yield current


def _made(folder: str, manifest: SubmissionManifest, submission: bytes) -> Made:
    """What was committed there, without files that are damaged."""
    others = [entry.key for entry in manifest.files if entry.key != SUBMISSION]
    found = {key: read_verified(folder, manifest, key) for key in others}
    whole = {key: content for key, content in found.items() if content is not None}
    return Made({SUBMISSION: submission, **whole}, manifest.rows, manifest.smape, manifest.history)


def published_before(folder: str, rows: int) -> str:
    """URL of a submission that is there already."""
    url = storage.join(folder, SUBMISSION)
    log.info(event="published_before", rows=rows, submission=url)
    return url


def _current(settings: PredictConfig) -> tuple[str, SubmissionManifest] | None:
    pointer = pointers.read(SubmissionPointer, settings.output, "submissions", settings.name, "current")
    if pointer is None:
        return None
    folder = storage.join(settings.output, "submissions", pointer.submission)
    manifest = _whole(SubmissionManifest, storage.join(folder, MANIFEST))
    return (folder, manifest) if manifest else None


def _whole(kind: type[T], url: str) -> T | None:
    # A damaged one must not stop the next submission.
    return schemas.read_if_whole(kind, url, "submission_damaged")


def read_verified(folder: str, manifest: SubmissionManifest, key: str) -> bytes | None:
    """A file of a submission; None, with a warning, if it is not what the manifest says."""
    url = storage.join(folder, key)
    content = storage.read_if_exists(url)
    if content is not None and storage.sha256(content) == manifest.sha256_of(key):
        return content
    log.warning(event="submission_damaged", submission=url, reason="it is not what its manifest says")
    return None


def publish(settings: PredictConfig, origin: Origin, made: Made, current: str | None = None) -> str:
    """Commits the submission under its date and points to it, unless a later date is current; its URL.

    Args:
        current: folder of the submission that is current, if it is known.
    """
    key = f"{settings.name}/{settings.day()}/{storage.sha256(made.files[SUBMISSION])[:12]}"
    folder = storage.join(settings.output, "submissions", key)
    there = {storage.base(url) for url in storage.ls(folder)}
    before = _same_publication(settings, origin, folder) if MANIFEST in there else None
    if before is None or not _is_whole(folder, before):
        _write_damaged(folder, made.files, there)
        if before is None or before.files != manifests.entries(made.files):
            _commit(folder, _manifest(settings, origin, made, _previous(settings, key, current)))
    url = storage.join(folder, SUBMISSION)
    log.info(event="published_before" if before else "published", rows=made.rows, submission=url)
    point_to(settings, key)
    return url


def _is_whole(folder: str, manifest: SubmissionManifest) -> bool:
    """Whether all of its files are there as they should be.

    Then they stay: what another kind of processor computes may differ from them in digits that no price shows.
    """
    return all(read_verified(folder, manifest, entry.key) is not None for entry in manifest.files)


def _manifest(settings: PredictConfig, origin: Origin, made: Made, previous: str) -> SubmissionManifest:
    return SubmissionManifest(
        SCHEMA,
        manifests.entries(made.files),
        rows=made.rows,
        date=settings.day(),
        smape=made.smape,
        history=made.history,
        name=settings.name,
        previous=previous,
        **asdict(origin),
    )


def _commit(folder: str, manifest: SubmissionManifest) -> None:
    url, data = storage.join(folder, MANIFEST), seal(asdict(manifest))
    if not storage.create(url, data):  # a damaged one, or one of another origin with the same prices
        storage.write(url, data)


def point_to(settings: PredictConfig, key: str, seen: tuple[bytes, str] | None = None) -> None:
    """Makes `<name>/<date>/<digest>` the current submission, unless one of a later date is.

    Args:
        seen: the pointer as it was read a moment ago.
    """
    is_current = pointers.move(
        settings.output,
        *("submissions", settings.name, "current"),
        target=SubmissionPointer(key),
        unless=lambda current: current.date > settings.day(),
        seen=seen,
    )
    if not is_current:
        log.warning(event="not_current", date=settings.day(), reason="a submission of a later date is")


def _write_damaged(folder: str, files: Mapping[str, bytes], there: Collection[str]) -> None:
    """Writes the files that are not there as they should be; those that are not `there` without a look."""
    for name, content in files.items():
        if name not in there or storage.read_if_exists(storage.join(folder, name)) != content:
            manifests.write_files(folder, {name: content})


def _same_publication(settings: PredictConfig, origin: Origin, folder: str) -> SubmissionManifest | None:
    """The folder's manifest, if it is one of these prices from this origin under this name and date."""
    found = _whole(SubmissionManifest, storage.join(folder, MANIFEST))
    return found if found is not None and origin.same_as(found) and _is_of(settings, found) else None


def _is_of(settings: PredictConfig, manifest: SubmissionManifest) -> bool:
    """Whether the manifest is of this name and date; earlier versions wrote no name."""
    return manifest.date == settings.day() and manifest.name in ("", settings.name)


def _previous(settings: PredictConfig, key: str, current: str | None) -> str:
    if current is not None:
        before = current.removeprefix(storage.join(settings.output, "submissions", ""))
        return before if before != key else ""
    pointer = pointers.read(SubmissionPointer, settings.output, "submissions", settings.name, "current")
    return pointer.submission if pointer and pointer.submission != key else ""


def submission_csv(ids: Sequence[str], prices: np.ndarray) -> bytes:
    """`sample_id,price` in the given order, prices as plain numbers.

    Raises:
        DivergedError: a price that is not finite, or not above 0, as of a model whose weights are not finite.
    """
    wrong = ~(np.isfinite(prices) & (prices > 0))
    if wrong.any():
        first = ", ".join(f"{sample_id} ({prices[i]})" for i, sample_id in enumerate(ids) if wrong[i])[:80]
        raise DivergedError(
            f"{int(wrong.sum())} predicted prices are not finite numbers above 0, the first: {first}",
            "train the model again, or predict with another --run-id; nothing was published",
        )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["sample_id", "price"])
    # Floats of Python: those of NumPy take three times as long to format.
    writer.writerows((sample_id, plain(price)) for sample_id, price in zip(ids, prices.tolist(), strict=True))
    return buffer.getvalue().encode()


def plain(price: float) -> str:
    """The price to a hundredth of a cent; one below a cent to six digits. Never with an exponent.

    >>> plain(12.34567), plain(0.00001234567)
    ('12.3457', '0.0000123457')
    """
    if price >= SMALLEST_IN_CENTS:
        return f"{price:.4f}"
    return np.format_float_positional(price, precision=6, unique=False, fractional=False, trim="-")


def last(settings: PredictConfig) -> Last | None:
    """The submission that is current under this name; None if there is none, or it is damaged."""
    found = _current(settings)
    content = read_verified(*found, SUBMISSION) if found else None
    if found is None or content is None:
        return None
    frame = pd.read_csv(io.BytesIO(content), dtype={"sample_id": "str"}, keep_default_na=False)
    return Last(found[1], frame.set_index("sample_id")["price"], _prints(*found))


def _prints(folder: str, manifest: SubmissionManifest) -> pd.DataFrame | None:
    if not manifest.sha256_of(FINGERPRINTS):  # of an earlier version
        return None
    content = read_verified(folder, manifest, FINGERPRINTS)
    if content is None:
        return None
    frame = pd.read_parquet(io.BytesIO(content))
    return frame.set_index(frame.pop("sample_id").astype("str"))
