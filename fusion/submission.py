"""A submission: what it is made of, whether it is there already, whether it may be published, and its publication.

Nothing here loads torch: a night on which nothing has changed costs seconds, and no GPU.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import numpy as np
import pandas as pd

from fusion import log, manifests, pointers, records, storage
from fusion.config import PredictConfig, RunConfig, digest
from fusion.errors import DataError, DivergedError
from fusion.inputs import find_table, sources_digest
from fusion.manifests import MANIFEST, SUBMISSION
from fusion.metrics import MIN_PRICE, compute_smape
from fusion.records import RunFacts, SubmissionManifest, SubmissionPointer
from fusion.runs import code_digest, open_run

C = TypeVar("C", bound=RunConfig)
T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """What a submission is made of, known before anything is computed.

    Attributes:
        data: URL of the input.
        table_sha256: of the bytes of `test.csv`.
        inputs_sha256: of `table_sha256` and the versions of all embeddings.
        code_sha256: of this package.
    """

    run: str
    checkpoint: str
    model_sha256: str
    data: str
    table_sha256: str
    inputs_sha256: str
    code_sha256: str

    def key(self) -> str:
        """The same for the same model, data and code, wherever they lie."""
        return digest([self.model_sha256, self.inputs_sha256, self.code_sha256])

    def same_as(self, made: Origin | SubmissionManifest) -> bool:
        """Whether the other, or a submission with this manifest, was made of the same model, data and code."""
        compared = ("model_sha256", "inputs_sha256", "code_sha256")
        return all(getattr(made, name) == getattr(self, name) for name in compared)


def origin_of(run: str, chosen: manifests.Checkpoint, config: RunConfig, data: str, split: str = "test") -> Origin:
    """What predictions of a split are made of.

    Raises:
        DataError: the table or a source of the split does not exist.
    """
    table = storage.sha256(storage.read(find_table(data, split)))
    inputs = digest([table, sources_digest(data, split, config.bindings())])
    return Origin(run, chosen.name, chosen.model_sha256, data, table, inputs, code_digest())


def published(settings: PredictConfig, config_class: type[C]) -> str | None:
    """URL of the submission of this date when model, data and code have not changed since the last; else None.

    The last one is published again under this date if it bears another.

    Raises:
        DataError: no such run, or no such input.
    """
    settings = replace(settings, date=settings.day())  # midnight may come in between
    run, config, best = open_run(settings, config_class)
    return reuse(settings, origin_of(run, best, config, settings.data or config.data))


def reuse(settings: PredictConfig, origin: Origin) -> str | None:
    """As `published`, for a known origin."""
    for folder, manifest in _candidates(settings):
        content = _read_verified(folder, manifest) if origin.same_as(manifest) else None
        if content is not None:
            return publish(settings, origin, content, manifest.rows)
    return None


def _candidates(settings: PredictConfig) -> Iterator[tuple[str, SubmissionManifest]]:
    """Committed submissions that may be the one wanted, with their manifests: those of its date, then the current."""
    for folder in storage.ls(storage.join(settings.output, "submissions", settings.name, settings.day())):
        manifest = _whole(SubmissionManifest, storage.join(folder, MANIFEST))
        if manifest is not None:
            yield folder, manifest
    current = _current(settings)
    if current is not None:
        yield current


def _current(settings: PredictConfig) -> tuple[str, SubmissionManifest] | None:
    pointer = pointers.read(SubmissionPointer, settings.output, "submissions", settings.name, "current")
    if pointer is None:
        return None
    folder = storage.join(settings.output, "submissions", pointer.submission)
    manifest = _whole(SubmissionManifest, storage.join(folder, MANIFEST))
    return (folder, manifest) if manifest else None


def _whole(kind: type[T], url: str) -> T | None:
    # A damaged one must not stop the next submission.
    return records.read_if_whole(kind, url, "submission_damaged")


def _read_verified(folder: str, manifest: SubmissionManifest) -> bytes | None:
    url = storage.join(folder, SUBMISSION)
    content = storage.read_if_exists(url)
    if content is not None and storage.sha256(content) == manifest.sha256_of(SUBMISSION):
        return content
    log.warning(event="submission_damaged", submission=url, reason="it is not what its manifest says")
    return None


def publish(settings: PredictConfig, origin: Origin, content: bytes, n_rows: int) -> str:
    """Commits the submission under its date and points to it, unless a later date is current; its URL."""
    key = f"{settings.name}/{settings.day()}/{storage.sha256(content)[:12]}"
    folder = storage.join(settings.output, "submissions", key)
    before = _whole(SubmissionManifest, storage.join(folder, MANIFEST))
    if storage.read_if_exists(storage.join(folder, SUBMISSION)) != content:  # another one is damaged: see its name
        manifests.write_files(folder, {SUBMISSION: content})
    if before is None or not origin.same_as(before):
        files = manifests.entries({SUBMISSION: content})
        manifest = SubmissionManifest(schema=1, files=files, rows=n_rows, date=settings.day(), **asdict(origin))
        committed, data = storage.join(folder, MANIFEST), storage.as_json(asdict(manifest))
        if not storage.create(committed, data):  # a damaged one, or one of another origin with the same prices
            storage.write(committed, data)
    is_current = pointers.move(
        settings.output,
        *("submissions", settings.name, "current"),
        target=SubmissionPointer(key),
        unless=lambda current: current.date > settings.day(),
    )
    url = storage.join(folder, SUBMISSION)
    log.info(event="published_before" if before else "published", rows=n_rows, submission=url)
    if not is_current:
        log.warning(event="not_current", date=settings.day(), reason="a submission of a later date is")
    return url


def submission_csv(ids: Sequence[str], prices: np.ndarray) -> bytes:
    """`sample_id,price` in the given order, prices in dollars to a hundredth of a cent.

    Raises:
        DivergedError: a price that is not finite, or below a cent, as of a model whose weights are not finite.
    """
    wrong = ~(np.isfinite(prices) & (prices >= MIN_PRICE))
    if wrong.any():
        first = ", ".join(f"{sample_id} ({prices[i]})" for i, sample_id in enumerate(ids) if wrong[i])[:80]
        raise DivergedError(
            f"{int(wrong.sum())} predicted prices are not finite numbers of at least a cent, the first: {first}",
            "train the model again, or predict with another --run-id; nothing was published",
        )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["sample_id", "price"])
    writer.writerows((sample_id, f"{price:.4f}") for sample_id, price in zip(ids, prices, strict=True))
    return buffer.getvalue().encode()


def check(settings: PredictConfig, prices: pd.Series, run: str) -> None:
    """Compares prices, by sample_id, with those of the last submission and with the training prices.

    Raises:
        DataError: they are too far from what is expected, and --force was not given. The last one stays current.
    """
    wrong = [*_against_last(settings, prices), *_against_training(settings, prices, run)]
    if wrong and settings.force:
        log.warning(event="forced", reason="; ".join(wrong))
    elif wrong:
        raise DataError(
            f"not published: {'; '.join(wrong)}",
            "look for the cause in the embeddings and test.csv; if it is right, publish it with --force",
        )


def _against_last(settings: PredictConfig, prices: pd.Series) -> Iterator[str]:
    last = _last_prices(settings)
    if last is None:
        return
    if len(prices) < settings.min_rows * len(last):
        yield f"{len(prices)} rows, the last submission has {len(last)} (--min-rows {settings.min_rows})"
    common = prices.index.intersection(last.index)
    if len(common):
        change = compute_smape(last[common].to_numpy(), prices[common].to_numpy())
        log.info(event="compared", rows=len(common), change=change)
        if change > settings.max_change:
            yield (
                f"prices of {len(common)} products differ by {change:.1f}% (SMAPE) from the last submission's: "
                f"embeddings under other ids, or quite another model (--max-change {settings.max_change:g})"
            )
    yield from _drift(prices, _quartiles(last), settings.max_drift, "the last submission's", "--max-drift")


def _against_training(settings: PredictConfig, prices: pd.Series, run: str) -> Iterator[str]:
    facts = records.read(RunFacts, storage.join(run, "run.json"))
    if facts and facts.price_quartiles:  # runs of earlier versions have none
        limit = settings.max_training_drift
        yield from _drift(prices, facts.price_quartiles, limit, "the training prices'", "--max-training-drift")


def _drift(prices: pd.Series, expected: Sequence[float], limit: float, whose: str, flag: str) -> Iterator[str]:
    for quantile, now, then in zip((25, 50, 75), _quartiles(prices), expected, strict=True):
        if max(now / then, then / now) > limit:
            yield f"the {quantile}% quantile is {now:.2f}, {whose} {then:.2f} ({flag} {limit:g})"


def _quartiles(prices: pd.Series) -> list[float]:
    return [float(value) for value in prices.quantile([0.25, 0.5, 0.75])]


def _last_prices(settings: PredictConfig) -> pd.Series | None:
    last = _current(settings)
    content = _read_verified(*last) if last else None
    if content is None:
        return None
    frame = pd.read_csv(io.BytesIO(content), dtype={"sample_id": "str"}, keep_default_na=False)
    return frame.set_index("sample_id")["price"]
