"""What the command lines of this package share."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusion.errors import ConfigError


def checkout() -> Path:
    """The folder with k8s/ and slurm/: the checkout that this code is in, else the current folder.

    These folders are not part of the installed package, and are copied to where jobs are sent from.
    """
    around = Path(__file__).parents[2]
    return around if (around / "k8s").is_dir() else Path()


def refuse_empty(given: argparse.Namespace) -> None:
    """Raises ConfigError for a flag with an empty value, such as `--output "$BUCKET"` where BUCKET is not set."""
    for name, value in vars(given).items():
        if value == "":
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is empty", f"give {flag} a value, or leave it out")
