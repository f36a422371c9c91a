"""Finds the trackers that --tensorboard and --tracker name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from fusion.config import RunConfig
from fusion.errors import ConfigError
from fusion.records.run import RunFolder
from fusion.tracking.protocol import Tracker

# What --tracker can name without a module: the package it needs, and how to install it.
PACKAGES = {"mlflow": "pip install mlflow-skinny", "wandb": "pip install wandb"}
INSTALL_TENSORBOARD = "pip install tensorboard"
METHODS = ("start", "epoch", "end")


def trackers_of(config: RunConfig, run: RunFolder) -> dict[str, Tracker]:
    """The trackers by name.

    Raises:
        ConfigError: a tracker does not exist, or needs a package that is not installed.
    """
    found: dict[str, Tracker] = {}
    if config.tensorboard:
        from fusion.tracking.tensorboard import TensorBoard

        _require("tensorboard", "--tensorboard", INSTALL_TENSORBOARD)
        found["tensorboard"] = TensorBoard(run)
    if config.tracker in PACKAGES:
        _require(config.tracker, f"--tracker {config.tracker}", PACKAGES[config.tracker])
        found[config.tracker] = _built_in(config.tracker)
    elif config.tracker is not None:
        found[config.tracker] = _made_by(config.tracker)
    return found


def _require(package: str, flag: str, install: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{flag} needs the package {package}, which is not installed", install)


def _built_in(name: str) -> Tracker:
    if name == "mlflow":
        from fusion.tracking.mlflow import MLflow

        return MLflow()
    from fusion.tracking.wandb import WandB

    return WandB()


def _made_by(name: str) -> Tracker:
    """The tracker that the function `package.module:factory` returns."""
    module, _, factory = name.partition(":")
    try:
        make: Callable[[], Tracker] = getattr(import_module(module), factory)
        made = make()
    except Exception as error:  # code of the user
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        hint = f"check `python -c 'from {module} import {factory}; {factory}()'`; PYTHONPATH may name its folder"
        raise ConfigError(f"--tracker {name} made no tracker: {reason}", hint) from error
    missing = [method for method in METHODS if not callable(getattr(made, method, None))]
    if missing:
        raise ConfigError(
            f"--tracker {name} made a {type(made).__name__} without {', '.join(missing)}",
            "see fusion/tracking/protocol.py for the methods that a tracker has",
        )
    return made
