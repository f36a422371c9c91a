"""Finds the variants: packages of `fusion` that contain a run's settings, a model, and three commands."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import fusion
from fusion.config import RunConfig
from fusion.errors import ConfigError


def variants() -> list[str]:
    """Names of the variants: every package of `fusion` whose module `config` defines a subclass of `RunConfig`."""
    names = [found.name for found in pkgutil.iter_modules(fusion.__path__) if found.ispkg]
    return [name for name in names if _has_settings(name)]


def _has_settings(name: str) -> bool:
    # find_spec does not import the package: others than variants load torch, which may not be installed here.
    package = find_spec(f"fusion.{name}")
    folders = package.submodule_search_locations if package else None
    if "config" not in [found.name for found in pkgutil.iter_modules(folders or [])]:
        return False
    config = getattr(import_module(f"fusion.{name}.config"), "Config", None)
    return isinstance(config, type) and issubclass(config, RunConfig)


def config_class_of(variant: str) -> type[RunConfig]:
    """The class of the settings of a variant's runs.

    Raises:
        ConfigError: there is no such variant.
    """
    if variant not in variants():
        raise ConfigError(
            f"this version of fusion has no variant {variant!r}, only {', '.join(variants())}",
            "use the version of fusion that the run was trained with, or leave the run out",
        )
    found: type[RunConfig] = import_module(f"fusion.{variant}.config").Config
    return found


def network_of(variant: str) -> Callable[..., Any]:
    """The variant's `build_network(config, dims)`. Importing it loads torch."""
    build: Callable[..., Any] = import_module(f"fusion.{variant}.model").build_network
    return build


def network_for(config_class: type[RunConfig]) -> Callable[..., Any]:
    """`build_network` of the module `model` beside that of the settings. Importing it loads torch.

    Raises:
        ConfigError: there is none.
    """
    package = config_class.__module__.rpartition(".")[0]
    if not package or find_spec(f"{package}.model") is None:
        raise ConfigError(
            f"{config_class.__module__} has no module `model` beside it, whose build_network makes the network",
            "use the Config of a variant, such as fusion.all_embeddings.config.Config",
        )
    build: Callable[..., Any] = import_module(f"{package}.model").build_network
    return build
