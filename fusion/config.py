"""The settings of each command, as frozen and validated dataclasses.

`fusion.command.settings` fills them from flags, environment variables and a file. Each variant subclasses `RunConfig`
in its own `config.py` and adds its sources and the sizes of its hidden layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import date, datetime
from typing import Any, ClassVar, Literal, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from fusion.errors import did_you_mean

# Settings that change where and how a run is computed, but not its result. They are left out of the digest that names
# a run, and may differ when a run is resumed.
HOW = {"output", "run_id", "device", "store_timeout", "grace", "stall_timeout", "fresh"}
HOW |= {"checkpoint_seconds", "checkpoint_steps", "keep", "promote", "cache", "residency", "tensorboard", "tracker"}
# (setting, value, other settings that have no effect when the first setting has this value)
UNUSED: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("model", "concat", ("n_tokens", "n_heads", "n_experts")),
    ("schedule", "cosine", ("lr_patience", "lr_factor", "min_lr")),
    ("schedule", "plateau", ("warmup",)),
    ("neighbours", 0, ("neighbour_dropout", "approximate_above")),
)

C = TypeVar("C")
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
RUN_ID = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"  # also a valid Kubernetes name (an RFC 1123 label)
A_RUN_ID = "at most 63 small letters, digits and hyphens, such as my-run-1"


class SettingError(ValueError):
    """A value that is not allowed, with a hint that is more exact than to change it."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def setting(
    default: Any, help: str, group: str, expected: str = "", *, common: bool = False, **constraints: Any
) -> Any:
    """A field of a config.

    Args:
        help: what `--help` says about it, with the unit.
        group: the heading of `--help` under which it is listed.
        common: whether `--help` lists it; `--help-all` lists all. Sources are always listed.
        expected: what its `pattern` allows, in words, for error messages.
        constraints: the allowed range, as keyword arguments of pydantic's `Field`.
    """
    extra: dict[str, Any] = {"group": group, "expected": expected, "common": common or group == "sources"}
    return Field(default, description=help, json_schema_extra=extra, **constraints)


Residency = Literal["auto", "device", "host", "mapped"]
Shuffle = Literal["rows", "blocks"]
LossName = Literal[
    "weighted_smape",
    "smape",
    "focal_smape",
    "hybrid_focal_smape",
    "weighted_huber",
    "quantile_huber",
    "adaptive_huber",
    "focal_huber",
    "huber",
    "mse",
    "mae",
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StoreConfig:
    """Settings that every command has: where runs are stored, and how long to wait for the store.

    Attributes:
        variant: name of the package that the settings belong to; empty where it is not known yet.
    """

    variant: ClassVar[str] = ""

    output: str = setting("output", "bucket or folder of results", "where", common=True)
    run_id: str | None = setting(
        None,
        "name of the run; by default from its settings",
        "where",
        A_RUN_ID,
        common=True,
        pattern=RUN_ID,
    )
    device: str = setting(
        "auto",
        "auto, cpu, cuda or cuda:N",
        "machine",
        "auto, cpu, cuda or cuda:0",
        common=True,
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )
    store_timeout: float = setting(60.0, "seconds to retry a store that does not answer", "machine", ge=0)
    cache: str | None = setting(
        None,
        "folder on a disk of this machine to keep the embeddings in; the next job on it does not read them again, and "
        "they may be larger than the memory",
        "machine",
    )
    residency: Residency = setting(
        "auto",
        "where rows are kept while they are used; device: memory of the GPU, host: memory of the machine, mapped: "
        "--cache; auto: the first that is large enough",
        "machine",
    )

    @model_validator(mode="after")
    def _has_cache(self) -> StoreConfig:
        if self.residency == "mapped" and self.cache is None:
            raise ValueError("--residency mapped needs --cache FOLDER, which the rows are read from")
        return self

    def without_effect(self) -> str:
        """Says which given setting has no effect because of another one; empty if all of them have an effect.

        Only called for settings that a user gives, not for those that were read from a run. A setting that has its
        default value counts as not given, because a run's config.json, which may be passed as `--config`, contains
        all defaults.
        """
        return ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig(StoreConfig):
    """Settings of a training run that all variants share. The defaults are the recipe that scored best.

    Attributes:
        earlier_tokens: tokens per source of models of versions that had no setting for it.
        published: the values that `--recipe published` uses instead of the defaults; each variant adds more.
    """

    earlier_tokens: ClassVar[int] = 1
    published: ClassVar[Mapping[str, Any]] = {
        "model": "fusion",
        "width": 512,
        "dropout": 0.25,
        "components": 0,
        "neighbours": 0,
        "neighbour_dropout": 0.0,
        "input_dropout": 0.0,
        "input_noise": 0.0,
        "loss": "weighted_smape",
        "epochs": 1000,
        "lr": 1e-3,
        "schedule": "plateau",
        "warmup": 0.0,
        "patience": 15,
    }

    data: str = setting("data", "bucket or folder with train.csv, test.csv and embeddings/", "where", common=True)

    text_column: str | None = setting(
        None, "column whose equal texts are near-duplicates; by default catalog_content, if there is one", "data"
    )
    group_column: str | None = setting(None, "column whose equal values must stay on one side of the split", "data")
    interval_by: str | None = setting(
        None, "column for whose values prediction intervals differ; by default category, if there is one", "data"
    )
    validate_after: tuple[str, str] | None = setting(
        None,
        "rows whose date in COLUMN is on or after DATE validate, earlier ones train; replaces --val-fraction",
        "data",
    )
    features: tuple[Literal["text"], ...] = setting(
        (), "further sources to compute from the tables; text: words and quantities of the text column", "data"
    )
    columns: tuple[str, ...] = setting((), "columns of train.csv and test.csv to use as one more source", "data")
    max_missing: float = setting(
        0.05, "largest share of rows that a source may lack; above it, the run fails", "data", ge=0, le=1
    )
    drop_bad_prices: bool = setting(False, "drop rows whose price is missing, NaN, zero or negative", "data")
    val_fraction: float = setting(0.2, "share of the rows that validate", "data", gt=0, lt=1)
    folds: int | None = setting(
        None,
        "number of folds, each of which some members hold out; replaces --val-fraction",
        "data",
        common=True,
        ge=2,
    )
    fold: int | None = setting(None, "the only one of the --folds to hold out, from 0; by default all", "data", ge=0)

    recipe: Literal["best", "published"] = setting(
        "best", "best: defaults that scored best; published: those of the published models, no neighbours", "model"
    )
    seeds: int = setting(1, "members per fold, which differ in their initial weights", "model", ge=1)
    neighbours: int = setting(
        128, "number of most similar training rows that each row is compared with; 0: none", "model", ge=0
    )
    neighbour_dropout: float = setting(
        0.3, "share of the neighbours hidden from a row in training", "model", ge=0, lt=1
    )
    approximate_above: int = setting(
        1_000_000,
        "labelled rows above which a CPU finds neighbours approximately, which needs faiss; a GPU never does",
        "model",
        ge=0,
    )
    components: int = setting(
        256, "principal components that each source is projected on; 0: no projection", "model", ge=0
    )
    model: Literal["concat", "fusion"] = setting(
        "concat", "concat: a plain network; fusion: attention and mixture of experts", "model"
    )
    width: int = setting(192, "features that each source is mapped to", "model", ge=1)
    n_tokens: int = setting(1, "tokens that attention gets of each source", "model", ge=1)
    n_heads: int = setting(8, "attention heads", "model", ge=1)
    n_experts: int = setting(3, "experts in the mixture", "model", ge=1)
    dropout: float = setting(0.5, "share of features dropped in training", "model", ge=0, lt=1)
    input_dropout: float = setting(0.3, "share of inputs dropped in training", "model", ge=0, lt=1)
    input_noise: float = setting(0.3, "deviation of the noise added to inputs in training", "model", ge=0)
    modality_dropout: float = setting(0.05, "share of sources hidden from a row in training", "model", ge=0, lt=1)

    loss: LossName = setting("smape", "loss to minimise, see fusion/loss_functions.py", "training")
    epochs: int = setting(20, "passes over the rows, at most", "training", common=True, ge=1)
    batch_size: int = setting(256, "rows per step, of all ranks", "training", common=True, ge=1)
    shuffle: Shuffle = setting(
        "rows",
        "order of the training rows; rows: any order; blocks: runs of 1,024 rows in any order, mixed with 15 others, "
        "for --cache on a slow disk",
        "training",
    )
    shard_rows: bool = setting(
        False,
        "each node reads and keeps only its share of the rows, and each batch has as large a share of every node's "
        "rows; the result then depends on the number of nodes, and only as many can resume it",
        "training",
    )
    lr: float = setting(2e-3, "learning rate of AdamW", "training", common=True, gt=0)
    schedule: Literal["cosine", "plateau"] = setting(
        "cosine", "cosine: the learning rate falls to 0 over --epochs; plateau: when progress stalls", "training"
    )
    warmup: float = setting(0.05, "share of the steps in which the cosine schedule rises", "training", ge=0, lt=1)
    weight_decay: float = setting(1e-4, "weight decay of AdamW", "training", ge=0)
    clip: float = setting(1.0, "gradients are clipped to this L2 norm", "training", gt=0)
    lr_patience: int = setting(3, "epochs without progress before the learning rate falls", "training", ge=0)
    lr_factor: float = setting(0.5, "factor applied to the learning rate when progress stalls", "training", gt=0, lt=1)
    min_lr: float = setting(1e-6, "smallest learning rate", "training", ge=0)
    patience: int | None = setting(
        None, "epochs without a better validation SMAPE before training stops; by default never", "training", ge=1
    )
    seed: int = setting(41, "seed of the split, the weights, the row order and dropout", "training", ge=0, lt=2**32)
    checkpoint_seconds: float = setting(60.0, "seconds between checkpoints, at most one in flight", "stopping", ge=0)
    checkpoint_steps: int = setting(0, "steps between checkpoints; 0: by time alone", "stopping", ge=0)
    keep: int = setting(2, "number of committed checkpoints that a run keeps", "stopping", ge=1)
    grace: float = setting(60.0, "seconds between the cluster's stop signal and its kill", "stopping", gt=0)
    stall_timeout: float = setting(
        600.0,
        "seconds without a step after which a rank dumps its stacks and exits with 124; 0: never",
        "stopping",
        ge=0,
    )
    promote: bool = setting(
        False, "serve this run from now on, even if another run was trained on other data", "training"
    )
    fresh: bool = setting(False, "fail if the run exists, instead of resuming it", "stopping")
    precision: Literal["fp32", "bf16", "auto"] = setting(
        "fp32", "arithmetic of the training step; auto: the faster one, measured when the run starts", "machine"
    )

    tensorboard: bool = setting(False, "write event files for TensorBoard to the run's tensorboard/", "machine")
    tracker: str | None = setting(
        None,
        "another tool that follows the training: mlflow, wandb, or package.module:factory, see fusion/tracking",
        "machine",
        "mlflow, wandb, or a function such as my_package.my_module:make_tracker",
        pattern=r"^(mlflow|wandb|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_recipe(cls, values: Any) -> Any:
        """Fills in the values of `--recipe published`; explicitly given values take precedence."""
        given = values.kwargs if isinstance(values, ArgsKwargs) else values
        if not isinstance(given, Mapping) or given.get("recipe") != "published":
            return values
        return {**cls.published, **given}

    def __post_init__(self) -> None:
        if self.folds is not None and (self.fold or 0) >= self.folds:
            raise ValueError(f"--fold is {self.fold}, expected one of 0..{self.folds - 1} for --folds {self.folds}")
        bound = [name for name in asdict(self).get("sources", {}).values() if "{fold}" in name]
        if self.folds is None and (self.fold or bound):
            given = f"--fold is {self.fold}" if self.fold else f"the source {bound[0]!r} contains {{fold}}"
            raise ValueError(f"{given}, but --folds is not given")
        if self.validate_after is not None:
            self._check_validate_after(*self.validate_after)
        if taken := {"sample_id", "price"}.intersection(self.columns):
            raise ValueError(f"--columns names {min(taken)}, which is the row's id or target and cannot be an input")
        if len(set(self.columns)) < len(self.columns) or len(set(self.features)) < len(self.features):
            raise ValueError("--columns or --features lists the same name twice")
        if self.folds is not None and self.fold is None and bound:
            raise ValueError(f"the source {bound[0]!r} contains {{fold}}, so --fold must select one of the --folds")
        if self.neighbours and not self.components:
            raise ValueError("--neighbours needs principal components, but --components is 0")
        if self.shard_rows:
            self._check_shard_rows()
        if self.width % self.n_heads:
            raise ValueError(f"--width {self.width} is not divisible by --n-heads {self.n_heads}")

    def without_effect(self) -> str:
        for setting_name, value, unused in UNUSED:
            given = [name for name in unused if self._is_given(name)]
            if getattr(self, setting_name) == value and given:
                flag = given[0].replace("_", "-")
                return f"--{flag} has no effect with --{setting_name} {value}"
        if self.val_fraction != type(self).val_fraction and (self.folds is not None or self.validate_after is not None):
            return f"--val-fraction has no effect with --{'folds' if self.folds else 'validate-after'}"
        return ""

    def _is_given(self, name: str) -> bool:
        """Whether the setting differs both from its default and from the recipe's value."""
        usual = [getattr(type(self), name)]
        if self.recipe == "published":
            usual.append(self.published.get(name))
        return getattr(self, name) not in usual

    def _check_shard_rows(self) -> None:
        if self.cache is not None:
            raise ValueError("--shard-rows keeps rows in memory, so it cannot be combined with --cache")
        if self.features or self.columns:
            flag = "features" if self.features else "columns"
            raise ValueError(f"--shard-rows cannot be combined with --{flag}: these are computed on every node")

    def _check_validate_after(self, column: str, day: str) -> None:
        try:
            datetime.fromisoformat(day)
        except ValueError as error:
            expected = "a date or timestamp such as 2026-01-31 or 2026-01-31T12:00+02:00"
            raise ValueError(f"--validate-after {column!r} has the date {day!r}, expected {expected}") from error
        if self.folds is not None:
            raise ValueError("--folds and --validate-after exclude each other: both choose the validation rows")
        if column in (self.text_column, self.group_column):
            other = "text" if column == self.text_column else "group"
            raise ValueError(f"--validate-after and --{other}-column both use the column {column!r}")

    def held_out(self) -> tuple[int, ...]:
        """For each member of the ensemble, the part of the split that it does not train on; 0 without folds."""
        if self.folds is not None and self.fold is None:
            parts: Iterable[int] = range(self.folds)
        else:
            parts = (self.fold or 0,)
        return tuple(part for part in parts for _ in range(self.seeds))

    def bindings(self) -> dict[str, str]:
        """Role to name of the source bound to it, in the model's order.

        `{fold}` in a name is replaced by `--fold`. Use it for an encoder that was fine-tuned on prices: it needs one
        set of embeddings per fold, made by an encoder that never saw that fold's validation rows. Otherwise prices
        leak into the validation score.
        """
        return {role: name.replace("{fold}", str(self.fold)) for role, name in asdict(self)["sources"].items()}

    def name(self) -> str:
        """The run's id: `--run-id`, else the variant and a digest of all settings that change the result."""
        if self.run_id:
            return self.run_id
        settings = {key: value for key, value in asdict(self).items() if key not in HOW}
        return f"{self.variant.replace('_', '-')}-{digest(settings)[:8]}"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReadRunConfig(StoreConfig):
    """Settings of a command that uses a finished run. All other settings are those that the run was trained with."""

    run_id: str | None = setting(
        None,
        "name of the run to use; by default the variant's best in --output",
        "where",
        A_RUN_ID,
        common=True,
        pattern=RUN_ID,
    )
    run_dir: str | None = setting(None, "folder of the run to use, in place of --run-id", "where")
    data: str | None = setting(None, "bucket or folder of the input; by default the run's", "where", common=True)

    def without_effect(self) -> str:
        name = (self.run_dir or "").rstrip("/").rpartition("/")[2]
        if self.run_dir and self.run_id and name != self.run_id:
            return f"--run-dir is the run {name}, but --run-id is {self.run_id}"
        return ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig(ReadRunConfig):
    by: tuple[str, ...] = setting(
        (), "columns of train.csv to group by, besides prices and presence", "evaluation", common=True
    )
    all: bool = setting(False, "print all tables, and every metric of each group", "evaluation", common=True)
    other_data: bool = setting(
        False, "evaluate even if prices or embeddings differ from those of the training; the log says so", "evaluation"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AblateConfig(ReadRunConfig):
    run_id: str | None = setting(None, "name of the run to use", "where", A_RUN_ID, common=True, pattern=RUN_ID)
    other_data: bool = setting(
        False, "ablate even if prices or embeddings differ from those of the training; the log says so", "evaluation"
    )

    def __post_init__(self) -> None:
        if not self.run_id and not self.run_dir:
            remedy = "name a run with --run-id; `python jobs/pull.py runs` lists them"
            raise SettingError("neither --run-id nor --run-dir is given", remedy)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PredictConfig(ReadRunConfig):
    name: str = setting(
        "test",
        "what the submission is published as",
        "submission",
        "at most 100 letters, digits, dots, hyphens and underscores, such as my-prices",
        common=True,
        pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$",
        max_length=100,  # it becomes the name of a folder; file systems allow 255 bytes
    )
    max_missing: float | None = setting(
        None,
        "largest share of rows that a source may lack; above it, nothing is predicted; by default the run's",
        "submission",
        ge=0,
        le=1,
    )
    date: str | None = setting(
        None, "date of the submission; by default today in --time-zone", "submission", common=True
    )
    time_zone: str = setting("UTC", "decides which day is today, such as Europe/Berlin", "submission", common=True)
    min_rows: float = setting(
        0.8, "smallest number of rows, as a share of the last submission's", "submission", ge=0, le=1
    )
    max_change: float | None = setting(
        None,
        "largest SMAPE between prices of the same products in this submission and the last, in %; by default 0.4 "
        "times that of shuffled prices, or 0.6 times if the model has changed",
        "submission",
        ge=0,
    )
    max_drift: float = setting(
        1.5, "largest factor between a quartile of these prices and of the last submission's", "submission", ge=1
    )
    max_training_drift: float = setting(
        3.0, "largest factor between a quartile of these prices and of the training prices", "submission", ge=1
    )
    force: bool = setting(False, "publish even if a check fails", "submission", common=True)

    def __post_init__(self) -> None:
        try:
            ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            message = f"--time-zone is {self.time_zone!r}, expected one such as Europe/Berlin"
            raise SettingError(message, f"{_similar_zone(self.time_zone)}change --time-zone") from error
        with suppress(ValueError):
            if self.date is None or self.date == date.fromisoformat(self.date).isoformat():
                return
        message = f"--date is {self.date!r}, expected a day as YYYY-MM-DD"
        raise SettingError(message, f"for today: --date {datetime.now(ZoneInfo(self.time_zone)).date().isoformat()}")

    def day(self) -> str:
        """The date of the submission, YYYY-MM-DD: `--date`, or today in `--time-zone`."""
        return self.date or datetime.now(ZoneInfo(self.time_zone)).date().isoformat()


def _similar_zone(name: str) -> str:
    """The start of a hint with the time zone of a city, or the most similar one; empty if there is none."""
    known = sorted(available_timezones())
    ending = f"/{name.lower().replace(' ', '_')}"
    of_city = [zone for zone in known if f"/{zone.lower()}".endswith(ending)]
    return f"did you mean {min(of_city, key=len)}? " if of_city else did_you_mean(name, known)


def digest(value: object) -> str:
    """sha256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
