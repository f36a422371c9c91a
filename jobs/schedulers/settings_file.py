"""Reads the settings of a cluster, a TOML file that people write, and keeps keys out of it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fusion.errors import ConfigError

T = TypeVar("T")

# Words that names of variables with keys are made of, and beginnings of words; what ends with a word of A_PLACE says
# where a key is and not what it is. Heuristics: a key under a harmless name is not found out.
SECRET = re.compile(
    r"(^|_)(KEYS?|API_?KEY|TOKENS?|PAT|PASS|PWD|SAS|CREDENTIALS?|CONNECTION_STRING)(_|$)|SECRET|PASSW|PASSPHRASE",
    re.IGNORECASE,
)
A_PLACE = re.compile(r"_(FILE|PATH|DIR|FOLDER|URI|URL|PROFILE)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def read_settings(kind: type[T], path: Path, explained: str, merged: Callable[[Any], Any] = lambda values: values) -> T:
    """The settings in a file as a dataclass.

    Args:
        explained: the file that explains all keys.
        merged: makes the dataclass's values of those of the file.

    Raises:
        ConfigError: no such file, no TOML, an unknown key or a value that is not allowed.
    """
    try:
        return TypeAdapter(kind).validate_python(merged(tomllib.loads(path.read_text())))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "name the cluster's settings with --settings"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}", "correct the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {key + ': ' if key else ''}{message}", f"{explained} explains all keys") from error


def refuse_secrets(environment: Mapping[str, str], written: str) -> None:
    """Raises ValueError where a variable looks like a key, which would be `written` where others read it."""
    secret = next((name for name, value in environment.items() if _is_secret(name, value)), None)
    if secret:
        raise ValueError(f"environment holds {secret}, and would be written into {written}")


def _is_secret(name: str, value: str) -> bool:
    return bool(SECRET.search(name) and not A_PLACE.search(name)) or bool(PASSWORD_IN_URL.search(value))
