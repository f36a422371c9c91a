"""Checks of command-line arguments that all commands of `jobs/` share."""

from __future__ import annotations

import argparse

from fusion.errors import ConfigError


def refuse_empty(given: argparse.Namespace) -> None:
    """Raises ConfigError for a flag with an empty value, such as `--output "$BUCKET"` where BUCKET is not set."""
    for name, value in vars(given).items():
        if value == "":
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is empty", f"give {flag} a value, or leave it out")
