"""What the commands of `jobs/` have in common in how they read flags and variables."""

from __future__ import annotations

import argparse

from fusion.errors import ConfigError


def refuse_empty(given: argparse.Namespace) -> None:
    """Raises ConfigError for a flag without a value, as `--output "$BUCKET"` is where BUCKET is not set."""
    for name, value in vars(given).items():
        if value == "":
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is empty", f"give {flag} a value, or leave it out")
