"""Schemas of the JSON documents in a bucket, as typed dataclasses, and functions that read and write them.

Reading a document checks its keys and types, and an error names the key that is wrong. Every document except
`config.json`, which people may edit, is sealed: it contains a digest of itself, and a document that does not match its
digest is damaged. This detects accidents and mistakes, but not a change by somebody who recomputes the digest.
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

SCHEMA: Final = 2  # version of the documents that are written now. Those of version 1 were not sealed.

_REMEDY = "`python -m fusion.verify URL` says what else is"

Count = Annotated[int, Field(ge=0)]
# Name of one file or folder. The pattern excludes "/" and "..": a document cannot name a path outside of its folder.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Smape = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class FileEntry:
    """A file as a manifest lists it: its name, its size, and the sha256 of its bytes."""

    key: Name
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """A `MANIFEST.json`, which commits the files of a folder."""

    schema: Literal[1, 2]
    files: list[FileEntry]

    def sha256_of(self, key: str) -> str:
        """sha256 of a file of the folder; empty if the manifest does not list it."""
        return next((entry.sha256 for entry in self.files if entry.key == key), "")


@dataclass(frozen=True)
class CheckpointManifest(Manifest):
    """`checkpoints/step-…/MANIFEST.json`, which commits a checkpoint and says what it was made from.

    Attributes:
        step: optimizer steps taken.
        epoch: number of epochs that are complete.
        smape: of the weights in this checkpoint on the validation rows, in %; None before the first validation.
        finished: whether the training ended with this checkpoint.
        run_sha256: of the bytes of `run.json`, as `split_sha256` is of `split.parquet`.
        history: the files in `metrics/` with the history of the training, as they were when this checkpoint was
            written; later checkpoints append to them.
        earlier: names of the older checkpoints that were kept when this one was committed.
    """

    step: Count
    epoch: Count
    smape: Smape | None
    finished: bool
    config_sha256: Sha256
    data_sha256: Sha256
    revision: str
    split_sha256: str = ""
    memory_sha256: str = ""  # of `memory.safetensors`; empty: the model uses no neighbours
    features_sha256: str = ""  # of `features.safetensors`; empty: no source is computed from the tables
    code_sha256: str = ""
    baselines_sha256: str = ""  # of `baselines.json`; empty: the run has none
    validation_sha256: str = ""  # of the prices and vectors of the validation rows, independent of the files' layout
    # "role role" to the agreement of both on the training rows, see `fingerprints.agreements`.
    agreement: dict[str, float] = field(default_factory=dict)
    run_sha256: str = ""
    history: tuple[FileEntry, ...] = ()
    earlier: tuple[Name, ...] = ()

    @property
    def name(self) -> str:
        """Name of this checkpoint's own folder: step-00001200."""
        return f"step-{self.step:08d}"


@dataclass(frozen=True)
class IntervalBin:
    """A bin of rows that share prediction intervals, see `fusion.records.intervals`.

    Attributes:
        category: None stands for all categories, empty text for all categories without bins of their own.
        tier: index of the tier of the predicted price, from 0. None stands for all tiers or, within a category, for
            all tiers without a bin of their own.
        rows: number of validation rows in the bin.
        widths: for each level, half the width of the interval in log price, before it is scaled by the spread.
    """

    category: str | None
    tier: Count | None
    rows: PositiveInt
    widths: tuple[NotNegative, ...]


@dataclass(frozen=True)
class Intervals:
    """`checkpoints/step-…/intervals.json`: prediction intervals, see `fusion.records.intervals`.

    Attributes:
        levels: for each interval, the percentage of true prices that it contains.
        rows: number of validation rows that the intervals were fitted to.
        by: column of the table that `categories` are values of; empty if the table had no such column.
        categories: the categories that have bins of their own.
        tier_edges: limits between the tiers of the predicted price, in dollars, ascending.
        spread_edges: limits between the bins of the model's spread, ascending.
        scales: for each bin of the spread, the factor for the widths; empty if widths are not scaled.
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
    """How a published night changed the prices of the products that the night before had too.

    Attributes:
        model_sha256: of the model that predicted the night.
        change: SMAPE between the prices of both nights, in %.
        factor: median of the ratio of the new price to the former price.
    """

    date: str
    model_sha256: Sha256
    change: Smape
    factor: PositiveFloat


# Nights that a manifest remembers. The log notes a drift of prices over them; a drift that takes longer than these 30
# nights is not noted.
MAX_NIGHTS = 30


@dataclass(frozen=True)
class SubmissionManifest(Manifest):
    """`submissions/<name>/<date>/<digest>/MANIFEST.json`, which commits a submission and says what it was made from.

    Attributes:
        run: URL of the run that predicted the prices.
        data: URL or folder that `test.csv` and its embeddings were read from.
        table_sha256: of the bytes of `test.csv`.
        inputs_sha256: of `test.csv` and the versions of its embeddings.
        code_sha256: of the code that computes prices, see `provenance.code_digest`.
        smape: of the model on its validation rows, in %.
        history: changes of prices in the last nights, oldest first.
        previous: `<name>/<date>/<digest>` of the submission that was current when this one was published; empty if no
            submission was.
        run_data: the data that the run's settings name; a prediction reads them unless --data names others.
        sources: role to the name of the source that was read.
        inputs_version: as `Inputs.version` returns it: the versions of all input files, without reading them.
        intervals_sha256: of the `intervals.json` that bounds were computed with; empty if there are no bounds.
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
    smape: Smape | None = None
    history: list[Night] = field(default_factory=list)
    name: str = ""
    previous: str = ""
    run_data: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    inputs_version: str = ""
    intervals_sha256: str = ""


@dataclass(frozen=True)
class MetricsManifest(Manifest):
    """`metrics/MANIFEST.json`, which commits the files of an evaluation by groups."""

    checkpoint: Name
    run_id: str = ""
    model_sha256: str = ""
    data_sha256: str = ""


@dataclass(frozen=True)
class InputFile:
    """A file that a source was prepared from.

    Attributes:
        version: the store's tag of the version that was read; for a local file, its size, time and inode.
    """

    url: str
    bytes: Count
    version: str


@dataclass(frozen=True)
class SourceManifest(Manifest):
    """`<data>/embeddings/<split>/<source>/_MANIFEST.json`, which commits the files that `fusion.prepare` wrote.

    Attributes:
        dim: numbers per vector.
        shard_rows: file k has the vectors of rows k * shard_rows to (k + 1) * shard_rows of the sorted table.
        table_rows: number of rows of the table.
        table_sha256: of the table's ids, see `Table.ids_digest`.
        vectors: number of rows that have a vector.
        inputs: the files that were read, in their order.
    """

    source: Name
    split: Name
    dim: PositiveInt
    dtype: Literal["float16", "float32"]
    shard_rows: PositiveInt
    table_rows: PositiveInt
    table_sha256: Sha256
    vectors: PositiveInt
    inputs: tuple[InputFile, ...]


ENSEMBLE_VARIANT: Final = "ensemble"  # the variant of an ensemble in `run.json` and in the paths of pointers


@dataclass(frozen=True)
class EnsembleMember:
    """A run whose prices an ensemble averages.

    Attributes:
        run: path of its folder below the output, such as `runs/my-run-1`.
        weight: of the log price that the run predicts.
    """

    variant: str
    run: Annotated[str, Field(pattern=r"^runs/[A-Za-z0-9][A-Za-z0-9._-]*$")]
    checkpoint: Name
    model_sha256: Sha256
    weight: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class EnsembleRecord:
    """`ensemble.json`: the members of an ensemble. Its price is `exp(sum of weight * log price)` over the members.

    Attributes:
        members: their weights add up to 1.
        fitted: whether the weights were fitted to the validation rows; otherwise all recipes have equal weights.
        smape: on the rows of `validation.parquet`, in %. If the weights were fitted, each row is predicted with weights
            that were fitted without its group of near-duplicates.
        smape_error: standard error of `smape`, by groups of near-duplicates.
        equal_smape: SMAPE with equal weights of all recipes.
        best_member_smape: SMAPE of the best recipe alone.
        rows: number of rows that validate in all recipes.
        groups: number of groups of near-duplicates among them.
        rows_sha256: of the ids and prices of these rows; ensembles with the same digest can be compared.
        data: URL or folder of the data that the first member was trained on.
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
        """Digest of the members' models and weights, which identifies the ensemble as a run's model_sha256 does."""
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
    """How much a source contributes to the accuracy of a run.

    Attributes:
        alone: SMAPE with this source alone, in %.
        without: SMAPE with all other sources, in %.
        lost: `without` minus the SMAPE with all sources.
        shapley: Shapley value: how much the source lowers the SMAPE, on average over all orders of adding sources.
    """

    role: str
    source: str
    alone: Smape
    without: Smape
    lost: Effect
    shapley: Effect


@dataclass(frozen=True)
class AblationRecord:
    """`metrics/ablation.json`: SMAPE of a run on its validation rows when sources are hidden from the model.

    Attributes:
        as_trained: as in `Evaluation`.
        everything, nothing: SMAPE with all sources, and without any, in %.
        sets: set of sources to the SMAPE with it, for each measured set; the key is the roles joined by spaces.
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
    """`pointers/submissions/<name>/current.json`: `<name>/<date>/<digest>` of the current submission."""

    submission: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/\d{4}-\d{2}-\d{2}/[0-9a-f]{12}$")]

    @property
    def date(self) -> str:
        return self.submission.split("/")[1]


@dataclass(frozen=True)
class RunPointer:
    """`pointers/runs/<variant>/<name>.json`: a run or an ensemble.

    Attributes:
        checkpoint: name of the run's best checkpoint; "ensemble.json" for an ensemble.
        smape: of the checkpoint on the validation rows, in %.
        split_sha256: of `split.parquet`; runs with the same digest validate on the same rows.
    """

    run_id: Name
    checkpoint: Name
    smape: Smape
    split_sha256: str = ""
    model_sha256: str = ""


@dataclass(frozen=True)
class PointerPath:
    """The path in any pointer of where it was written, such as `runs/qwen_clip/best`; earlier versions had none."""

    pointer: str = ""


@dataclass(frozen=True)
class DataOfRun:
    """The part of a run's `config.json` that says where its data are."""

    data: str


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """`run.json`: what a run was made from. Keys whose value is None are not written; an ensemble lacks some.

    Attributes:
        config_sha256: of the settings that decide what the run computes, see `run.config_digest`.
        data_sha256: of the training data.
        dims: role to the dimension of its embeddings.
        config_json_sha256: of the bytes of `config.json`.
        code_sha256: of the code that decides the result of a training, see `provenance.code_digest`.
        versions: of Fusion, Python, torch and NumPy.
        started: start of the run in UTC.
        price_quartiles: of the prices in `train.csv`, in dollars; earlier versions did not write them.
        world_size: number of ranks of the first attempt.
        n_nodes: number of nodes between which the rows are divided (--shard-rows); None if every node has all rows.
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
    n_nodes: PositiveInt | None = None
    revision: str = "unknown"
    versions: dict[str, str] | None = None
    started: str = ""


BaselineName = Literal["median price", "ridge regression"]


@dataclass(frozen=True)
class BaselineScore:
    """How well a simple method predicts the validation rows of a run.

    Attributes:
        smape: in %.
        low, high: 95% interval of `smape`, by groups of near-duplicates; None if there is only one group.
        training_rows: number of rows that it was fitted to.
        alphas: the factor of the sum of squared weights in a ridge regression, one per fold that validates.
    """

    name: BaselineName
    smape: Smape
    low: Smape | None
    high: Smape | None
    training_rows: PositiveInt
    alphas: tuple[PositiveFloat, ...] = ()


@dataclass(frozen=True)
class Baselines:
    """`baselines.json`: what a run has to beat on its own split, see `fusion.training.baselines`.

    Attributes:
        rows: number of validation rows.
        scores: one per method. Ridge regression is left out if its sources have too many dimensions.
    """

    schema: Literal[2]
    rows: PositiveInt
    scores: tuple[BaselineScore, ...]


@dataclass(frozen=True)
class LeaseRecord:
    """`lease.json`: the newest attempt at a run, which alone may write; `token` is a random text that identifies it."""

    attempt: PositiveInt
    token: str
    started: str


@dataclass(frozen=True)
class AttemptStart:
    """`attempts/<n>/start.json`: when an attempt started, in UTC."""

    attempt: PositiveInt
    started: str


@dataclass(frozen=True, kw_only=True)
class AttemptEnd:
    """`attempts/<n>/exit.json`: how an attempt ended. Keys whose value is None are not written.

    Attributes:
        code: exit code.
        error, hint: what went wrong, and what to do about it.
        step: of the newest committed checkpoint; -1 if there is no checkpoint.
        log: `log.txt` as it was then. It may be longer now: if the watchdog ends an attempt that is already ending,
            the end is recorded twice.
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
    """`pulled.json` in a folder that `jobs/pull.py` has written.

    Attributes:
        source: URL that the folder was copied from.
        left_out: paths below the folder of the files that were not copied.
    """

    source: str
    left_out: tuple[str, ...]


class Seal(Enum):
    """Result of comparing a document with the digest that it contains; the values are texts for messages."""

    WHOLE = "it is as it was written"
    BROKEN = "it has changed since it was written"
    ABSENT = "an earlier version wrote it, without a digest of itself"


def written(document: object) -> dict[str, Any]:
    """The document as a dict, without the keys whose value is None."""
    keys: dict[str, Any] = asdict(document)  # type: ignore[call-overload]
    return {key: value for key, value in keys.items() if value is not None}


def seal(document: Mapping[str, Any]) -> bytes:
    """The document as JSON, with the keys `schema` and `sha256`: the digest of its canonical JSON without `sha256`."""
    body = {"schema": SCHEMA} | {key: value for key, value in document.items() if key not in ("schema", "sha256")}
    return storage.as_json(body | {"sha256": digest(body)})


def seal_of(data: bytes) -> Seal:
    """Compares a JSON document with the digest that `seal` wrote into it."""
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
    """The current time in UTC, in the format of all documents: 2026-01-02T03:04:05Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read(kind: type[T], url: str) -> T | None:
    """Reads the JSON document at `url` as `kind`; None if it does not exist.

    Raises:
        DataError: as for `parse`.
    """
    data = storage.read_if_exists(url)
    return None if data is None else parse(kind, data, url)


def read_required(kind: type[T], url: str) -> T:
    """Reads the JSON document at `url` as `kind`.

    Raises:
        DataError: as for `parse`, or the document does not exist.
    """
    return parse(kind, storage.read(url), url)


def read_if_whole(kind: type[T], url: str, event: str) -> T | None:
    """Reads the JSON document at `url` as `kind`; None if it does not exist, or is damaged.

    A damaged document is logged as a warning with the event name `event`.
    """
    data = storage.read_if_exists(url)
    return None if data is None else parse_if_whole(kind, data, url, event)


def parse_if_whole(kind: type[T], data: bytes, url: str, event: str) -> T | None:
    """As `parse`, but None if the document is damaged, with a warning of the event name `event` in the log."""
    try:
        return parse(kind, data, url)
    except DataError as error:
        log.warning(event=event, reason=error.message)
        return None


def parse(kind: type[T], data: bytes, url: str) -> T:
    """The JSON document `data` as `kind`; `url` is where it was read, for the error message.

    Raises:
        DataError: `data` is not JSON, a key is missing or has a wrong type, or the document does not match its digest.
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
    """The JSON as `kind`, without checking its digest; raises pydantic's ValidationError."""
    return cast(T, _adapter(cast(Any, kind)).validate_json(data, strict=True))


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def reason(first: Mapping[str, Any]) -> tuple[str, str]:
    """Turns one of pydantic's errors into two texts: what was expected, and what was found."""
    if first["type"] == "json_invalid":
        return "JSON", first["msg"]
    key = ".".join(map(str, first["loc"])) or "an object"
    if first["type"] == "missing":
        return key, "nothing of that name"
    return f"{key} for which {first['msg'][0].lower()}{first['msg'][1:]}", repr(first["input"])[:80]
