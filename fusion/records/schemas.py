"""The JSON documents of a bucket as types. A reader gets what a document promises, or an error that names the key.

Every document but `config.json`, which people may write, is sealed: it holds a digest of itself, and what does not fit
its digest is damaged. This protects against accidents and mistakes, not against somebody who recomputes the digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar, cast

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fusion import log, storage
from fusion.config import digest
from fusion.errors import DataError

T = TypeVar("T")

SCHEMA: Final = 2  # of the documents written now: they are sealed. Those of schema 1 were not.

_REMEDY = "`python -m fusion.verify URL` says what else is"

Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # of one file or folder: no way out of its own
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Smape = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class FileEntry:
    key: Name
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    schema: Literal[1, 2]
    files: list[FileEntry]

    def sha256_of(self, key: str) -> str:
        return next((entry.sha256 for entry in self.files if entry.key == key), "")


@dataclass(frozen=True)
class CheckpointManifest(Manifest):
    """`checkpoints/step-…/MANIFEST.json`

    Attributes:
        run_sha256: of the bytes of `run.json`, as `split_sha256` is of `split.parquet`.
        history: what `metrics/` had of the training's history then; later checkpoints append to these files.
        earlier: checkpoints that pruning has left beside this one.
    """

    step: Count
    epoch: Count
    smape: Smape | None
    finished: bool
    config_sha256: Sha256
    data_sha256: Sha256
    revision: str
    split_sha256: str = ""
    memory_sha256: str = ""  # of `memory.safetensors`; empty: the model leans on no neighbours
    features_sha256: str = ""  # of `features.safetensors`; empty: no source is computed
    code_sha256: str = ""
    validation_sha256: str = ""  # of the validation rows' prices and vectors, whatever files they came from
    agreement: dict[str, float] = field(default_factory=dict)  # of each pair of roles on the training rows
    run_sha256: str = ""
    history: tuple[FileEntry, ...] = ()
    earlier: tuple[Name, ...] = ()

    @property
    def name(self) -> str:
        """Of the folder that it belongs in."""
        return f"step-{self.step:08d}"


@dataclass(frozen=True)
class IntervalBin:
    """Rows whose errors intervals are made of.

    Attributes:
        category: None: all; empty: all that have no bins of their own.
        tier: of the predicted price, from 0; None: all, or all of the category that have no bins of their own.
        widths: of each level: half the width of an interval in log price, before it is scaled by the spread.
    """

    category: str | None
    tier: Count | None
    rows: PositiveInt
    widths: tuple[NotNegative, ...]


@dataclass(frozen=True)
class Intervals:
    """`checkpoints/step-…/intervals.json`

    Attributes:
        levels: percent of the true prices that lie within.
        rows: that they were made of.
        by: column of the table that `categories` are values of; empty: there was none.
        categories: those with bins of their own.
        tier_edges: dollars between the tiers, rising.
        spread_edges: between the bins of the model's spread, rising.
        scales: of each bin of the spread, what widths are multiplied by; empty: 1.
    """

    schema: Literal[1, 2]
    levels: tuple[PositiveInt, ...]
    rows: PositiveInt
    by: str
    categories: tuple[str, ...]
    tier_edges: tuple[PositiveFloat, ...]
    spread_edges: tuple[float, ...]
    scales: tuple[PositiveFloat, ...]
    bins: tuple[IntervalBin, ...]


@dataclass(frozen=True)
class Night:
    """What a published night did to the prices of the products that the one before had.

    Attributes:
        change: SMAPE between both nights' prices, in %.
        factor: median of tonight's price over the last one.
    """

    date: str
    model_sha256: Sha256
    change: Smape
    factor: PositiveFloat


MAX_NIGHTS = 30  # a month: as long as prices may creep before anybody compares


@dataclass(frozen=True)
class SubmissionManifest(Manifest):
    """`submissions/<name>/<date>/<digest>/MANIFEST.json`

    Attributes:
        previous: `<name>/<date>/<digest>` of the submission that was current when this one was made; empty: none was.
        run_data: the data that the run's settings name, which a prediction reads unless it is given others.
        sources: role to the name of the source that was read.
        inputs_version: of `Inputs.version`.
        intervals_sha256: of the `intervals.json` that bounds were computed with; empty: there was none.
    """

    rows: PositiveInt
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    run: str
    checkpoint: Name
    model_sha256: Sha256
    data: str = ""
    table_sha256: str = ""
    inputs_sha256: str = ""
    code_sha256: str = ""
    smape: Smape | None = None  # of the model on its validation rows
    history: list[Night] = field(default_factory=list)  # oldest first
    name: str = ""
    previous: str = ""
    run_data: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    inputs_version: str = ""
    intervals_sha256: str = ""


@dataclass(frozen=True)
class MetricsManifest(Manifest):
    """`metrics/MANIFEST.json`, of the files that an evaluation has written there."""

    checkpoint: Name
    run_id: str = ""
    model_sha256: str = ""
    data_sha256: str = ""


ENSEMBLE_VARIANT: Final = "ensemble"  # stands where a run's variant stands


@dataclass(frozen=True)
class EnsembleMember:
    """A run that an ensemble asks for prices.

    Attributes:
        run: its folder below the output, such as `runs/my-run-1`.
        weight: of its log price.
    """

    variant: str
    run: Annotated[str, Field(pattern=r"^runs/[A-Za-z0-9][A-Za-z0-9._-]*$")]
    checkpoint: Name
    model_sha256: Sha256
    weight: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class EnsembleRecord:
    """`ensemble.json`: a price is `exp(sum of weight * log price)` over the members.

    Attributes:
        members: their weights add up to 1.
        fitted: whether the weights were fitted; else those of recipes are equal.
        smape: of `validation.parquet`, in %: with fitted weights, each row by those that were fitted without its group.
        smape_error: standard error of it, by groups of near-duplicates.
        rows: that all of the recipes validated on.
        rows_sha256: of their ids and prices: ensembles that share it can be compared.
        data: where the first member had its data.
    """

    run_id: Name
    members: Annotated[list[EnsembleMember], Field(min_length=1)]
    fitted: bool
    smape: Smape
    smape_error: Smape | None
    equal_smape: Smape
    best_member_smape: Smape
    rows: PositiveInt
    groups: PositiveInt
    rows_sha256: Sha256
    data: str

    def model_sha256(self) -> str:
        """Digest of what decides a price: the members' models and their weights."""
        return digest([[member.model_sha256, member.weight] for member in self.members])


@dataclass(frozen=True)
class Effect:
    """A mean over rows, in % of SMAPE, with its standard error and 95% interval by groups of near-duplicates."""

    mean: float
    error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SourceWorth:
    """What a source is worth to a run.

    Attributes:
        alone: SMAPE with this source alone.
        without: SMAPE with all others.
        lost: `without` less the SMAPE with all sources.
        shapley: what it lowers the SMAPE by, on average over the orders in which sources can be joined.
    """

    role: str
    source: str
    alone: Smape
    without: Smape
    lost: Effect
    shapley: Effect


@dataclass(frozen=True)
class AblationRecord:
    """`metrics/ablation.json`: what a run's sources are worth on its validation rows, by hiding them from the model.

    Attributes:
        as_trained: as of `Evaluation`.
        everything, nothing: SMAPE with all sources, and with none.
        sets: SMAPE with each set of sources that was asked; roles are joined by spaces.
    """

    run_id: Name
    checkpoint: Name
    model_sha256: Sha256
    data_sha256: Sha256
    as_trained: bool | None
    rows: PositiveInt
    groups: PositiveInt
    everything: Smape
    nothing: Smape
    sources: list[SourceWorth]
    sets: dict[str, Smape]


@dataclass(frozen=True)
class SubmissionPointer:
    submission: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/\d{4}-\d{2}-\d{2}/[0-9a-f]{12}$")]

    @property
    def date(self) -> str:
        return self.submission.split("/")[1]


@dataclass(frozen=True)
class RunPointer:
    run_id: Name
    checkpoint: Name
    smape: Smape
    split_sha256: str = ""  # of `split.parquet`: runs that share it validate on the same rows
    model_sha256: str = ""


@dataclass(frozen=True)
class PointerPlace:
    """Of any pointer: where it was written, such as `runs/qwen_clip/best`; earlier versions did not say."""

    pointer: str = ""


@dataclass(frozen=True)
class DataOfRun:
    """Of a run's `config.json`: where its data are."""

    data: str


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """`run.json`: what a run is made from. Keys that are None are not written: an ensemble has fewer.

    Attributes:
        config_sha256: of the settings that decide what the run computes.
        config_json_sha256: of the bytes of `config.json`.
        code_sha256: of the code that decides what a training computes.
        dims: role to dimension of its embeddings.
        price_quartiles: of the prices, in dollars.
        versions: of Fusion, Python and the libraries that compute.
    """

    run_id: Name
    variant: str
    config_sha256: Sha256
    config_json_sha256: str | None = None
    code_sha256: str | None = None
    data_sha256: Sha256
    dims: dict[str, PositiveInt]
    price_quartiles: tuple[float, float, float] | None = None
    world_size: PositiveInt | None = None
    revision: str = "unknown"
    versions: dict[str, str] | None = None
    started: str = ""


@dataclass(frozen=True)
class LeaseRecord:
    """`lease.json`: the newest attempt at a run."""

    attempt: PositiveInt
    token: str
    started: str


@dataclass(frozen=True)
class AttemptStart:
    """`attempts/<n>/start.json`"""

    attempt: PositiveInt
    started: str


@dataclass(frozen=True, kw_only=True)
class AttemptEnd:
    """`attempts/<n>/exit.json`: how an attempt ended. Keys that are None are not written.

    Attributes:
        code: the exit code of the command.
        error, hint: what went wrong, and what to do about it.
        step: of the newest committed checkpoint; -1: there is none.
        log: what `log.txt` had then; an attempt that ends twice, as by the watchdog, appends to it.
    """

    attempt: int | None = None
    code: int
    error: str | None = None
    hint: str | None = None
    step: int
    ended: str
    log: FileEntry | None = None


@dataclass(frozen=True)
class Pulled:
    """`pulled.json` in a folder that `jobs/pull.py` has made: what it did not fetch, by path below the folder."""

    source: str
    left_out: tuple[str, ...]


class Seal(Enum):
    """What a document's digest of itself says of it."""

    WHOLE = "it is as it was written"
    BROKEN = "it has changed since it was written"
    ABSENT = "an earlier version wrote it, without a digest of itself"


def written(document: object) -> dict[str, Any]:
    """The keys of a document that are written: all that are not None."""
    keys: dict[str, Any] = asdict(document)  # type: ignore[call-overload]
    return {key: value for key, value in keys.items() if value is not None}


def seal(document: Mapping[str, Any]) -> bytes:
    """The document as JSON, with its schema and with `sha256`: a digest of its canonical JSON without that key."""
    body = {"schema": SCHEMA} | {key: value for key, value in document.items() if key not in ("schema", "sha256")}
    return storage.as_json(body | {"sha256": digest(body)})


def seal_of(data: bytes) -> Seal:
    """Whether a JSON document is as `seal` wrote it."""
    try:
        document = json.loads(data)
    except ValueError:
        return Seal.BROKEN
    if not isinstance(document, dict):
        return Seal.BROKEN
    if "sha256" not in document and document.get("schema", 1) == 1:
        return Seal.ABSENT
    found = document.pop("sha256", None)
    return Seal.WHOLE if found == digest(document) else Seal.BROKEN


def now() -> str:
    """The time in UTC as all documents have it: 2026-01-02T03:04:05Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read(kind: type[T], url: str) -> T | None:
    """The JSON document at `url` as `kind`; None when there is none.

    Raises:
        DataError: as `parse`.
    """
    data = storage.read_if_exists(url)
    return None if data is None else parse(kind, data, url)


def read_required(kind: type[T], url: str) -> T:
    """The JSON document at `url` as `kind`.

    Raises:
        DataError: as `parse`, or there is none.
    """
    return parse(kind, storage.read(url), url)


def read_if_whole(kind: type[T], url: str, event: str) -> T | None:
    """The JSON document at `url` as `kind`; None when there is none, or when it is damaged: a warning, `event`."""
    data = storage.read_if_exists(url)
    return None if data is None else parse_if_whole(kind, data, url, event)


def parse_if_whole(kind: type[T], data: bytes, url: str, event: str) -> T | None:
    """The JSON document at `url` as `kind`; None when it is damaged: a warning, `event`."""
    try:
        return parse(kind, data, url)
    except DataError as error:
        log.warning(event=event, reason=error.message)
        return None


def parse(kind: type[T], data: bytes, url: str) -> T:
    """The JSON document at `url` as `kind`.

    Raises:
        DataError: it is no JSON, a key is missing or holds something else, or it has changed since it was written.
    """
    try:
        value = validated(kind, data)
    except ValidationError as error:
        expected, found = reason(error.errors()[0])
        raise DataError(f"{url} is damaged: expected {expected}, found {found}", _REMEDY) from error
    if seal_of(data) is Seal.BROKEN:
        raise DataError(f"{url} is damaged: {Seal.BROKEN.value}", _REMEDY)
    return value


def validated(kind: type[T], data: bytes) -> T:
    """The JSON as `kind`; raises pydantic's ValidationError."""
    return cast(T, _adapter(cast(Any, kind)).validate_json(data, strict=True))


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def reason(first: Mapping[str, Any]) -> tuple[str, str]:
    """What was expected and what was found, of one of pydantic's errors."""
    if first["type"] == "json_invalid":
        return "JSON", first["msg"]
    key = ".".join(map(str, first["loc"])) or "an object"
    if first["type"] == "missing":
        return key, "nothing of that name"
    return f"{key} for which {first['msg'][0].lower()}{first['msg'][1:]}", repr(first["input"])[:80]
