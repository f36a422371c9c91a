"""Reads settings from flags, environment variables, a file and defaults, and reads and writes a run's `config.json`.

Every field of a config class in `fusion.config` is a flag (`batch_size` is `--batch-size`), an environment variable
(`FUSION_BATCH_SIZE`) and a key of the `--config` file. If several of them set it, the flag counts, then the variable,
then the file.
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
from fusion.config import EvaluateConfig, PredictConfig, RunConfig, SettingError, StoreConfig
from fusion.environment import rank, variable
from fusion.errors import ConfigError, DataError, Parser, did_you_mean
from fusion.terminal.help_screen import Rare

# The headings of --help, in the order in which they are shown.
GROUPS = ("where", "sources", "data", "model", "training", "evaluation", "submission", "stopping", "machine")
# Up to so many choices are shown right after the flag (`--model concat|fusion`); more are listed in the flag's help,
# where they do not widen the column of flags.
MOST_IN_METAVAR = 3
# How similar (by difflib, 0 to 1) an unknown variable must be to a known one to count as misspelt. Variables that
# belong to other tools may start with FUSION_, too, so this is stricter than difflib's 0.6.
MISSPELT = 0.85

C = TypeVar("C")


def to_json(config: RunConfig) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"


def from_json(config_class: type[C], text: str | bytes, origin: str) -> C:
    """The config that this version or an earlier one wrote with `to_json`.

    Args:
        origin: URL of the text, for messages.

    Raises:
        ConfigError: a key is unknown, or a value is not allowed; names the file, the key and what is allowed.
    """
    flags = _flags(config_class)
    try:
        values = json.loads(text)
        flat = _flatten(values)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{origin} is not a JSON file of settings: {error}", "use another run, or restore the file"
        ) from error
    _check_keys(origin, flat, flags)
    return _validate(config_class, _of_any_version(config_class, values), dict.fromkeys(flags, f"in {origin}"))


def _of_any_version(config_class: type[C], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adapts the settings of earlier versions.

    The first ones only had the published recipe, and wrote fold 0 without folds. Later ones had no setting for the
    number of tokens.
    """
    if values.get("model") == "fusion":
        values = {"n_tokens": getattr(config_class, "earlier_tokens", 1), **values}
    if "recipe" in values:
        return values
    fold = values.get("fold") if values.get("folds") is not None else None
    return {**values, "recipe": "published", "fold": fold}


def parse(config_class: type[C], argv: Sequence[str] | None = None, *, prog: str, description: str) -> C:
    """The settings from flags, environment, `--config` file and defaults.

    Args:
        prog, description: of the command, for `--help`.

    Raises:
        UsageError: a flag is unknown; names the most similar one.
        ConfigError: a value is not allowed; says where it was set, and what is allowed.
    """
    flags = _flags(config_class)
    values, origins = _collect(flags, argv, prog, description)
    _warn_of_misspelt(flags)
    return _given(config_class, _nest(values, flags), origins)


def from_values(config_class: type[C], values: Mapping[str, Any]) -> C:
    """The settings from values by name, with a mapping for each section, such as `sources`.

    Raises:
        ConfigError: as for `parse`.
    """
    return _given(config_class, values, {})


def _given(config_class: type[C], values: Mapping[str, Any], origins: Mapping[str, str]) -> C:
    """As `_validate`, for settings that a user gives: one that has no effect is an error, too."""
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
    """Warns of variables `FUSION_…` that resemble a known one. It is no error: all commands share the variables."""
    known = {key.replace(".", "_").upper() for one in (RunConfig, EvaluateConfig, PredictConfig) for key in _flags(one)}
    known |= {key.replace(".", "_").upper() for key in flags}
    given = {name.removeprefix("FUSION_") for name in os.environ if name.startswith("FUSION_")}
    for name in sorted(given - known):
        near = difflib.get_close_matches(name, known, 1, MISSPELT)
        if near and rank() == 0:
            log.warning(event="unknown_variable", name=f"FUSION_{name}", did_you_mean=f"FUSION_{near[0]}")


def as_flags(config_class: type[Any], argv: Sequence[str] | None = None, *, prog: str) -> list[str]:
    """All settings that are given anywhere, as flags: a later command with them needs no file and no environment.

    Raises:
        UsageError, ConfigError: as for `parse`.
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
    """Key to value of what is set by flag, environment or file, in this order, and key to where it was set."""
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
        argument_default=argparse.SUPPRESS,
        epilog="Every flag can also be set as a variable (FUSION_RUN_ID) or in --config.",
    )
    found = {field.json_schema_extra["group"] for field in flags.values()}
    groups = {name: parser.add_argument_group(name) for name in GROUPS if name in found}
    for key, field in flags.items():
        groups[field.json_schema_extra["group"]].add_argument(_flag(key), **_argument(key, field))
    groups["where"].add_argument("--config", metavar="FILE", help="JSON or TOML file with any of these settings")
    return parser


def _argument(key: str, field: Any) -> dict[str, Any]:
    options = _options(key, field)
    is_shown = field.json_schema_extra["common"]
    return options if is_shown else options | {"help": Rare(options["help"])}


def _options(key: str, field: Any) -> dict[str, Any]:
    text, kind = field.description.replace("%", "%%"), field.annotation
    names = _choices(kind)
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
    """Number of values of a tuple type or `tuple[…] | None`; 0: any number; None: the type is not a tuple."""
    kind = next((inner for inner in (kind, *get_args(kind)) if get_origin(inner) is tuple), None)
    if kind is None:
        return None
    return 0 if ... in get_args(kind) else len(get_args(kind))


def _element(kind: Any) -> Any:
    """The type of a single value: int for `int`, `int | None`, `tuple[int, ...]` and `tuple[PositiveInt, ...]`."""
    element = next(iter(get_args(kind)), kind)
    return next(iter(get_args(element)), element)


def _flags(config_class: type[Any]) -> dict[str, Any]:
    """Key to field. The fields of a nested dataclass have dotted keys, such as `sources.clip_image`."""
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
        toml = f"{storage.base(url).rpartition('.')[0]}.toml"
        remedy = f"YAML is not supported: write `lr = 0.1` into {toml}" if is_yaml else "correct the file"
        raise ConfigError(f"{url} is not a JSON or TOML file of settings: {error}", remedy) from error
    _check_keys(url, values, flags)
    return values


def _check_keys(origin: str, values: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    for key in values:
        if key not in flags:
            hint = did_you_mean(key, flags).strip() or f"allowed: {', '.join(flags)}"
            raise ConfigError(f"{origin} sets {key!r}, which is not a setting of this command", hint)


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _nest(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_flatten`; also splits texts from the environment or a file into tuples."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        length = _tuple_length(flags[key].annotation) if key in flags else None
        if length is not None and isinstance(value, str):
            # A tuple of known length is split from the right, so that its first value may contain commas, as the name
            # of a column may. With length 0 (any number), this splits at every comma.
            value = value.rsplit(",", length - 1)
        section, _, name = key.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[name] = value
    return nested


def _validate(config_class: type[C], values: Mapping[str, Any], origins: Mapping[str, str]) -> C:
    try:
        return TypeAdapter(config_class).validate_python(values)
    except ValidationError as error:
        raise _rejected(config_class, error.errors()[0], origins) from error


def _rejected(config_class: type[Any], first: Mapping[str, Any], origins: Mapping[str, str]) -> ConfigError:
    """The error for the first thing that pydantic rejects: a value, or a combination of values."""
    key = ".".join(part for part in first["loc"] if isinstance(part, str))  # without the position in a list
    reason = first["msg"].removeprefix("Value error, ")
    if not key:
        cause = first.get("ctx", {}).get("error")
        remedy = cause.remedy if isinstance(cause, SettingError) else f"change {' or '.join(_flags_in(reason))}"
        return ConfigError(reason, remedy)
    field = _flags(config_class).get(key)
    if first["type"] == "string_pattern_mismatch" and field:
        reason = f"expected {field.json_schema_extra['expected']}"
    where = f" ({origins[key]})" if origins.get(key) else ""
    near = did_you_mean(str(first["input"]), _choices(field.annotation) if field else ())
    message = f"{_flag(key)} is {first['input']!r}{where}: {reason[0].lower()}{reason[1:]}"
    return ConfigError(message, f"{near}give {_flag(key)} an allowed value")


def _choices(kind: Any) -> tuple[str, ...]:
    """The values of a Literal; none for other types."""
    return get_args(kind) if get_origin(kind) is Literal else ()
