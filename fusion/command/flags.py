"""Describes settings for people: which differ from their defaults, what each means, and the flags that give them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fusion.command.settings import _flag, _flags, _flatten, _words
from fusion.config import RunConfig


@dataclass(frozen=True)
class Setting:
    """A setting of a run.

    Attributes:
        key: dotted, such as `sources.clip_image`.
        flag: such as `--sources.clip-image`.
        default: the value without the flag, for the run's recipe.
        help: what `--help` says about it.
        group: the heading of `--help` under which it is listed.
        words: the flag and its value, as words for a shell.
    """

    key: str
    flag: str
    value: Any
    default: Any
    help: str
    group: str
    words: list[str]

    @property
    def is_default(self) -> bool:
        return bool(self.value == self.default)


def settings_of(config: RunConfig) -> list[Setting]:
    """All settings of a run, in the order of `--help`."""
    kind = type(config)
    values, defaults = _flatten(asdict(config)), _flatten(asdict(kind(recipe=config.recipe)))
    return [
        Setting(
            key,
            _flag(key),
            values[key],
            kind.recipe if key == "recipe" else defaults[key],
            field.description,
            field.json_schema_extra["group"],
            _words(key, values[key]),
        )
        for key, field in _flags(kind).items()
    ]
