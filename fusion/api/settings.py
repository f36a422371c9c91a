"""Settings from keyword arguments, with the checks and messages of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fusion.command.settings import from_values
from fusion.config import RunConfig, StoreConfig
from fusion.errors import ConfigError, did_you_mean
from fusion.variants import config_class_of, variants

C = TypeVar("C", bound=StoreConfig)
_FLAG = re.compile(r"--(no-)?([a-z][a-z.-]*)")


def make_config(variant: str, **settings: Any) -> RunConfig:
    """The settings of a training, checked; those that are not given have their defaults.

    >>> config = make_config("all_embeddings", data="data", output="output", epochs=3, recipe="published")
    >>> config.epochs, config.width
    (3, 512)

    Args:
        variant: "all_embeddings" or "qwen_clip".
        settings: the flags of the variant's `train` as keywords: `--batch-size 64` is `batch_size=64`, and
            `--sources.clip-image cnn` is `sources={"clip_image": "cnn"}`. Variables of the environment are not read.

    Returns:
        An instance of the variant's Config, such as `fusion.all_embeddings.config.Config`, which can also be made
        directly: it has a typed field for each setting.

    Raises:
        ConfigError: there is no such variant or setting, or a value is not allowed or has no effect.
    """
    if variant not in variants():
        near = did_you_mean(str(variant), variants())
        raise ConfigError(f"there is no variant {variant!r}", f"{near}use one of {', '.join(variants())}")
    return configured(config_class_of(variant), settings)


def configured(config_class: type[C], settings: Mapping[str, Any]) -> C:
    """An instance of a class of settings. Raises a ConfigError that names keywords where a command names flags."""
    known = [one.name for one in fields(config_class)]
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, known).strip() or f"use some of {', '.join(known)}"
            raise ConfigError(f"{name!r} is not a setting of {config_class.__module__}", hint)
    try:
        return from_values(config_class, settings)
    except ConfigError as error:
        raise ConfigError(_as_keywords(error.message), _as_keywords(error.remedy)) from None


def _as_keywords(text: str) -> str:
    """`--batch-size` as `batch_size`."""
    return _FLAG.sub(lambda found: found[2].replace("-", "_"), text)
