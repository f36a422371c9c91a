"""Lets the workers of a cluster reach the stores that the command reaches, with the same credentials and options."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import fsspec

from fusion import storage

# Variables of the clients of S3, of Google's and of Azure's stores. They may contain keys, so they travel with the
# functions that workers run, and not in Ray's `runtime_env`, which its dashboard and its log show.
_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_STORAGE_", "STORAGE_EMULATOR_HOST")


@dataclass(frozen=True)
class Access:
    """What decides how this process reaches stores.

    Attributes:
        variables: environment variables of the stores' clients.
        options: fsspec's configuration, from its files and variables.
        patience: seconds, see `storage.set_patience`.
    """

    variables: dict[str, str]
    options: dict[str, Any]
    patience: float

    @classmethod
    def of_this_process(cls) -> Access:
        variables = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
        return cls(variables, dict(fsspec.config.conf), storage.patience())

    def use(self) -> None:
        """Makes this process reach stores in the same way. Call it before the first access."""
        os.environ.update(self.variables)
        fsspec.config.conf.update(self.options)
        storage.set_patience(self.patience)

    def __repr__(self) -> str:  # without the keys
        return f"Access({', '.join(self.variables)})"
