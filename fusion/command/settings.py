"""How settings are given: by flags, environment, a file and defaults, in this order; and how a run's are kept.

Every field of `fusion.config` is a flag (`batch_size` is `--batch-size`), an environment variable
(`FUSION_BATCH_SIZE`) and a key of the `--config` file.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fusion import log, storage
from fusion.config import EvaluateConfig, PredictConfig, RunConfig, StoreConfig
from fusion.environment import rank, variable
from fusion.errors import ConfigError, DataError, Parser

# The headings of --help, in their order.
GROUPS = ("where", "sources", "data", "model", "training", "evaluation", "submission", "stopping", "machine")
MOST_IN_METAVAR = 3  # more names to choose from are listed in the flag's help

C = TypeVar("C")


def to_json(config: RunConfig) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"


def from_json(config_class: type[C], text: str | bytes, origin: str) -> C:
    """The config that `to_json` wrote, of this version or an earlier one; a key it does not know is an error.

    Raises:
        ConfigError: naming the file, the key and what is allowed.
    """
    flags = _flags(config_class)
    try:
        values = json.loads(text)
        flat = _flatten(values)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{origin} is no JSON with settings: {error}", "use another run, or restore the file"
        ) from error
    _check_keys(origin, flat, flags)
    return _validate(config_class, _of_any_version(values), dict.fromkeys(flags, f"in {origin}"))


def _of_any_version(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Earlier versions knew the published recipe alone, and called what has no folds fold 0."""
    if "recipe" in values:
        return values
    fold = values.get("fold") if values.get("folds") is not None else None
    return {**values, "recipe": "published", "fold": fold}


def parse(config_class: type[C], argv: Sequence[str] | None = None, *, prog: str, description: str) -> C:
    """Settings from flags, else environment, else the `--config` file, else defaults.

    Raises:
        UsageError: an unknown flag, with the nearest one that exists.
        ConfigError: a value out of range, with where it came from and what is allowed.
    """
    flags = _flags(config_class)
    values, origins = _collect(flags, argv, prog, description)
    _warn_of_misspelt(flags)
    return _given(config_class, _nest(values, flags), origins)


def _given(config_class: type[C], values: Mapping[str, Any], origins: Mapping[str, str]) -> C:
    """As `_validate`, for what a user gives: a setting that cannot take effect is an error."""
    config = _validate(config_class, values, origins)
    reason = config.without_effect() if isinstance(config, StoreConfig) else ""
    if reason:
        named = _flags_in(reason)
        found = [f"{_flag(key)} is {origin}" for key, origin in origins.items() if origin and _flag(key) in named]
        raise ConfigError("; ".join([reason, *found]), f"leave out {' or '.join(named)}")
    return config


def _flags_in(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"--[a-z][a-z-]*", text)))


def _warn_of_misspelt(flags: Mapping[str, Any]) -> None:
    """Variables are shared by all commands, so one that this command does not know is no error."""
    known = {key.replace(".", "_").upper() for one in (RunConfig, EvaluateConfig, PredictConfig) for key in _flags(one)}
    known |= {key.replace(".", "_").upper() for key in flags}
    given = {name.removeprefix("FUSION_") for name in os.environ if name.startswith("FUSION_")}
    for name in sorted(given - known):
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if near and rank() == 0:
            log.warning(event="unknown_variable", name=f"FUSION_{name}", did_you_mean=f"FUSION_{near[0]}")


def as_flags(config_class: type[Any], argv: Sequence[str] | None = None, *, prog: str) -> list[str]:
    """What is set anywhere, as flags alone: with them, neither a file nor the environment can change it later.

    Raises:
        UsageError, ConfigError: as `parse`.
    """
    flags = _flags(config_class)
    values, origins = _collect(flags, argv, prog, "")
    checked = _flatten(asdict(_given(config_class, _nest(values, flags), origins)))
    return [word for key in flags if key in values for word in _words(key, checked[key])]


def _words(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [_flag(key) if value else _flag(f"no-{key}")]
    if value in (None, ()):
        return []
    values = [str(one) for one in value] if isinstance(value, tuple) else [str(value)]
    return [f"{_flag(key)}={values[0]}"] if values[0].startswith("-") else [_flag(key), *values]


def _collect(
    flags: Mapping[str, Any], argv: Sequence[str] | None, prog: str, description: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """What is set by key, the first of flag, environment and file, and where each was found."""
    given = vars(_parser(flags, prog, description).parse_args(argv))
    file = given.pop("config", None) or variable("FUSION_CONFIG")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in (
        (f"in {file}", _read_file(file, flags) if file else {}),
        ("in the environment", {key: value for key in flags if (value := variable(_variable(key)))}),
        ("", given),
    ):
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    _check_filled(values, origins)
    return values, origins


def _check_filled(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    for key, value in values.items():
        if value == "" or (isinstance(value, list) and "" in value):
            where = f" ({origins[key]})" if origins[key] else ""
            raise ConfigError(f"{_flag(key)} is empty{where}", f"give {_flag(key)} a value, or leave it out")


def _parser(flags: Mapping[str, Any], prog: str, description: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every flag can also be set in the environment (--lr: FUSION_LR) or in the --config file.",
    )
    found = {field.json_schema_extra["group"] for field in flags.values()}
    groups = {name: parser.add_argument_group(name) for name in GROUPS if name in found}
    for key, field in flags.items():
        groups[field.json_schema_extra["group"]].add_argument(_flag(key), **_argument(key, field))
    groups["where"].add_argument("--config", metavar="FILE", help="JSON or TOML file with any of these settings")
    return parser


def _argument(key: str, field: Any) -> dict[str, Any]:
    text, kind = field.description.replace("%", "%%"), field.annotation
    names = get_args(kind) if get_origin(kind) is Literal else ()
    if len(names) > MOST_IN_METAVAR:
        text += f": {', '.join(names)}"
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": f"{text} (default: no)"}
    if field.default not in (None, ()):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" (default: {default})"
    if 0 < len(names) <= MOST_IN_METAVAR:
        return {"help": text, "metavar": "|".join(names)}
    metavars = (
        {int: "N", float: "X"}
        | dict.fromkeys(("data", "output", "run_dir"), "URL")
        | {"date": "YYYY-MM-DD", "time_zone": "ZONE", "validate_after": ("COLUMN", "DATE")}
    )
    options = {"help": text, "metavar": metavars.get(key) or metavars.get(_element(kind), "NAME")}
    length = _tuple_length(kind)
    return options if length is None else options | {"nargs": length or "+"}


def _tuple_length(kind: Any) -> int | None:
    """Number of values of a tuple, or of `tuple[…] | None`; 0 for any number; None: it is no tuple."""
    kind = next((inner for inner in (kind, *get_args(kind)) if get_origin(inner) is tuple), None)
    if kind is None:
        return None
    return 0 if ... in get_args(kind) else len(get_args(kind))


def _element(kind: Any) -> Any:
    """int of `int`, `int | None`, `tuple[int, ...]` and `tuple[PositiveInt, ...]`."""
    element = next(iter(get_args(kind)), kind)
    return next(iter(get_args(element)), element)


def _flags(config_class: type[Any]) -> dict[str, Any]:
    """Dotted key to field, nested dataclasses opened up: `sources.clip_image`."""
    hints = get_type_hints(config_class)
    flags: dict[str, Any] = {}
    for name, field in config_class.__pydantic_fields__.items():
        if is_dataclass(hints[name]):
            flags |= {f"{name}.{key}": inner for key, inner in _flags(hints[name]).items()}
        else:
            flags[name] = field
    return flags


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _variable(key: str) -> str:
    return "FUSION_" + key.replace(".", "_").upper()


def _read_file(url: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    try:
        data = storage.read(url)
    except DataError as error:
        raise DataError(error.message, "--config, or FUSION_CONFIG, must name a JSON or TOML file") from error
    try:
        text = data.decode()
        loaded = tomllib.loads(text) if url.endswith(".toml") else json.loads(text)
        values = _flatten(loaded)
    except (ValueError, AttributeError) as error:
        is_yaml = url.endswith((".yaml", ".yml"))
        remedy = "YAML is not read: write `lr = 0.1` into a .toml file" if is_yaml else "correct the file"
        raise ConfigError(f"{url} is neither JSON nor TOML with settings: {error}", remedy) from error
    _check_keys(url, values, flags)
    return values


def _check_keys(origin: str, values: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    for key in values:
        if key not in flags:
            near = difflib.get_close_matches(key, flags, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(flags)}"
            raise ConfigError(f"{origin} sets {key!r}, which is no setting here", hint)


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _nest(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        length = _tuple_length(flags[key].annotation) if key in flags else None
        if length is not None and isinstance(value, str):
            value = value.rsplit(",", length - 1)  # the first may have commas where their number is known
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _validate(config_class: type[C], values: Mapping[str, Any], origins: Mapping[str, str]) -> C:
    try:
        return TypeAdapter(config_class).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(part for part in first["loc"] if isinstance(part, str))  # without the position in a list
        reason = first["msg"].removeprefix("Value error, ")
        if not key:
            raise ConfigError(reason, f"change {' or '.join(_flags_in(reason))}") from error
        if first["type"] == "string_pattern_mismatch":
            reason = f"expected {_flags(config_class)[key].json_schema_extra['expected']}"
        where = origins.get(key, "")
        found = f"{_flag(key)} is {first['input']!r}" + (f" ({where})" if where else "")
        raise ConfigError(f"{found}: {reason[0].lower()}{reason[1:]}", f"give {_flag(key)} an allowed value") from error
