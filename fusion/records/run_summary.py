"""What a run says of itself in its folder: its settings, its variant, how many parameters it has, how long it took."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from fusion import storage
from fusion.errors import DataError
from fusion.records.schemas import AttemptEnd, AttemptStart, RunFacts, read, read_if_whole

_PARAMETERS = re.compile(r"\bevent=start\b.*\bparameters=(\d+)")


def settings_of(run: str) -> dict[str, Any]:
    """The settings in a run's `config.json`, sections as dotted keys: `sources.clip_image`.

    Raises:
        DataError: there are none, or they are damaged.
    """
    url = storage.join(run, "config.json")
    try:
        values = json.loads(storage.read(url))
    except ValueError as error:
        raise damaged(url, str(error)) from error
    if not isinstance(values, dict):
        raise damaged(url, f"expected an object with settings, found {values!r:.80}")
    return dict(_flat(values))


def damaged(url: str, cause: str) -> DataError:
    return DataError(
        f"{url} is damaged: {cause}", "compare other runs; `python -m fusion.verify URL` says what else is"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differing(settings: Sequence[Mapping[str, Any]], without: set[str]) -> dict[str, list[Any]]:
    """Settings that differ, each with one value per run; None where a run's variant has no such setting."""
    keys = dict.fromkeys(key for one in settings for key in one if key not in without)
    found = {key: [one.get(key) for one in settings] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def variant_of(run: str) -> str:
    """Empty for a run that never read its data."""
    facts = read(RunFacts, storage.join(run, "run.json"))
    return facts.variant if facts else ""


def parameters_of(run: str) -> int | None:
    """Parameters of the model, as the log of the training has them; None where it does not say."""
    for folder in storage.ls(storage.join(run, "attempts")):
        log = storage.read_if_exists(storage.join(folder, "log.txt"))
        found = _PARAMETERS.search(log.decode(errors="replace")) if log else None
        if found:
            return int(found[1])
    return None


def minutes_of(run: str) -> float | None:
    """Minutes that all attempts took; those that were killed do not count, for they did not say when they ended."""
    minutes = [_minutes(folder) for folder in storage.ls(storage.join(run, "attempts"))]
    known = [one for one in minutes if one is not None]
    return sum(known) if known else None


def _minutes(attempt: str) -> float | None:
    start = read_if_whole(AttemptStart, storage.join(attempt, "start.json"), "attempt_damaged")
    end = read_if_whole(AttemptEnd, storage.join(attempt, "exit.json"), "attempt_damaged")
    if start is None or end is None:
        return None
    began, ended = (datetime.fromisoformat(one) for one in (start.started, end.ended))
    return (ended - began).total_seconds() / 60
