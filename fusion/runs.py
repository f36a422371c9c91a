"""The folder of a run: where it is, what it was started with, how its attempts ended, and who is the best."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from fusion import __version__, log, storage
from fusion.config import ReadRunConfig, RunConfig, digest, from_json, to_json
from fusion.errors import ConfigError, DataError, ExitCode, FusionError

C = TypeVar("C", bound=RunConfig)

# Settings that say where and how a run is computed, not what it computes.
_PLACES = ("data", "output", "run_id", "device", "store_timeout")


def run_url(config: RunConfig) -> str:
    return storage.join(config.output, "runs", config.name())


def start_run(config: RunConfig) -> bool:
    """Writes `config.json`, the first thing a run writes; true when the run has finished before.

    Raises:
        ConfigError: the run exists with other settings.
    """
    url = storage.join(run_url(config), "config.json")
    if not storage.exists(url):
        storage.write(url, to_json(config).encode())
        return False
    before, now = asdict(from_json(type(config), storage.read(url), url)), asdict(config)
    changed = [key for key in now if key not in _PLACES and before[key] != now[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"run {config.name()} exists with {key}={before[key]!r}, now it is {now[key]!r}",
            "give this run another --run-id, or the settings it was started with",
        )
    return any(json.loads(end).get("code") == ExitCode.DONE for end in _ends(run_url(config)))


def _ends(run: str) -> Iterator[bytes]:
    for attempt in storage.ls(storage.join(run, "attempts")):
        end = storage.join(attempt, "exit.json")
        if storage.exists(end):
            yield storage.read(end)


def describe_run(config: RunConfig, data_digest: str, dims: Mapping[str, int], world_size: int) -> None:
    """Writes `run.json`: what this run was made from and with."""
    import numpy
    import torch

    facts = {
        "run_id": config.name(),
        "variant": config.variant,
        "config_sha256": digest(asdict(config)),
        "data_sha256": data_digest,
        "dims": dict(dims),
        "world_size": world_size,
        "revision": _revision(),
        "versions": {
            "fusion": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "started": _now(),
    }
    storage.write(storage.join(run_url(config), "run.json"), _json(facts))


@contextmanager
def attempt(run: str) -> Iterator[None]:
    """Records the start and the end of one try at a run, with its log, whichever way it ends."""
    number = 1 + len(storage.ls(storage.join(run, "attempts")))
    folder = storage.join(run, "attempts", str(number))
    storage.write(storage.join(folder, "start.json"), _json({"attempt": number, "started": _now()}))
    end: dict[str, Any] = {"attempt": number, "code": ExitCode.BUG}
    try:
        yield
        end["code"] = ExitCode.DONE
    except FusionError as error:
        end |= {"code": error.code, "error": error.message, "to_do": error.remedy}
        raise
    except Exception as error:
        end |= {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        storage.write(storage.join(folder, "log.txt"), log.text().encode())
        storage.write(storage.join(folder, "exit.json"), _json(end | {"ended": _now()}))


def find_run(settings: ReadRunConfig, variant: str) -> str:
    """URL of the run to use: `--run-dir`, else `--run-id`, else the variant's best under `--output`.

    Raises:
        DataError: there is none.
    """
    if settings.run_dir:
        return settings.run_dir.rstrip("/")
    if settings.run_id:
        return storage.join(settings.output, "runs", settings.run_id)
    best = read_pointer(settings.output, "runs", variant, "best")
    if best is None:
        raise DataError(
            f"no finished run of {variant} under {settings.output}",
            f"train one with `python -m fusion.{variant}.train`, or name one with --run-dir",
        )
    return storage.join(settings.output, "runs", best["run_id"])


def read_config(run: str, config_class: type[C]) -> C:
    """The settings that a run was started with.

    Raises:
        DataError: the run or its config does not exist.
        ConfigError: it belongs to another variant.
    """
    url = storage.join(run, "config.json")
    return from_json(config_class, storage.read(url), url)


def read_pointer(output: str, *parts: str) -> dict[str, Any] | None:
    url = storage.join(output, "pointers", *parts) + ".json"
    return cast(dict[str, Any], json.loads(storage.read(url))) if storage.exists(url) else None


def write_pointer(output: str, *parts: str, target: Mapping[str, Any]) -> None:
    storage.write(storage.join(output, "pointers", *parts) + ".json", _json(dict(target)))


def point_to_run(config: RunConfig, checkpoint: str, smape: float) -> None:
    """Makes the run its variant's latest, and its best when its validation SMAPE is the lowest so far."""
    target = {"run_id": config.name(), "checkpoint": checkpoint, "smape": smape, "updated": _now()}
    write_pointer(config.output, "runs", config.variant, "latest", target=target)
    best = read_pointer(config.output, "runs", config.variant, "best")
    if best is None or smape < best["smape"]:
        write_pointer(config.output, "runs", config.variant, "best", target=target)


def _revision() -> str:
    if "FUSION_REVISION" in os.environ:  # an image has no git
        return os.environ["FUSION_REVISION"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
