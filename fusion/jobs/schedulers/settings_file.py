"""Reads the TOML file with the settings of a cluster, and refuses secrets in it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fusion.errors import ConfigError

T = TypeVar("T")

# A heuristic for names of environment variables that hold a secret: the first group matches whole words between
# underscores, the others any part of the name. Names that also match LOCATION_NAME say where a secret is stored, and
# are allowed. A secret under another name is not found.
SECRET_NAME = re.compile(
    r"(^|_)(KEYS?|API_?KEY|TOKENS?|PAT|PASS|PWD|SAS|CREDENTIALS?|CONNECTION_STRING)(_|$)|SECRET|PASSW|PASSPHRASE",
    re.IGNORECASE,
)
LOCATION_NAME = re.compile(r"_(FILE|PATH|DIR|FOLDER|URI|URL|PROFILE)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def read_settings(kind: type[T], path: Path, explained: str, merge: Callable[[Any], Any] | None = None) -> T:
    """Reads the settings of a file into a dataclass.

    Args:
        explained: the file whose comments explain all keys, for hints.
        merge: turns the values of the file into those of the dataclass; None: they are the same.

    Raises:
        ConfigError: the file does not exist, is not TOML, or has an unknown key or an invalid value.
    """
    try:
        values = tomllib.loads(path.read_text())
        return TypeAdapter(kind).validate_python(merge(values) if merge else values)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "give the cluster's settings with --settings FILE"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", "correct the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {key + ': ' if key else ''}{message}", f"{explained} explains all keys") from error


def refuse_secrets(environment: Mapping[str, str], written: str) -> None:
    """Raises ValueError when a variable seems to hold a secret.

    Args:
        written: what the environment is written into, and where others could read it; for the message.
    """
    secret = next((name for name, value in environment.items() if _is_secret(name, value)), None)
    if secret:
        raise ValueError(f"environment holds {secret}, which would be written into {written} where others can read it")


def _is_secret(name: str, value: str) -> bool:
    is_secret_name = SECRET_NAME.search(name) and not LOCATION_NAME.search(name)
    return bool(is_secret_name or PASSWORD_IN_URL.search(value))
