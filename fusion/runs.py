"""The folder of a run: where it is, what it was started with, how its attempts ended, and who is the best."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from fusion import __version__, log, manifests, records, storage
from fusion.config import HOW, ReadRunConfig, RunConfig, digest, from_json, to_json
from fusion.errors import ConfigError, DataError, ExitCode, FusionError, StopRequested, SupersededError
from fusion.records import AttemptEnd, LeaseRecord, RunFacts

C = TypeVar("C", bound=RunConfig)


def run_url(config: RunConfig) -> str:
    return storage.join(config.output, "runs", config.name())


def start_run(config: RunConfig) -> None:
    """Writes `config.json`, the first thing a run writes.

    Raises:
        ConfigError: the run exists with other settings, or exists at all and --fresh was given.
    """
    url = storage.join(run_url(config), "config.json")
    if not storage.exists(url):
        storage.write(url, to_json(config).encode())
        return
    if config.fresh:
        raise ConfigError(
            f"run {config.name()} exists in {config.output}", "choose another --run-id, or leave out --fresh"
        )
    before, now = asdict(from_json(type(config), storage.read(url), url)), asdict(config)
    changed = [key for key in now if key not in HOW | {"data"} and before[key] != now[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"run {config.name()} exists with {key}={before[key]!r}, now it is {now[key]!r}",
            "give this run another --run-id, or the settings it was started with",
        )
    if not storage.exists(storage.join(run_url(config), "run.json")):
        storage.write(url, to_json(config).encode())  # it never read its data: perhaps --data was wrong


def describe_run(
    config: RunConfig, data_digest: str, dims: Mapping[str, int], quartiles: Sequence[float], world_size: int
) -> None:
    """Writes `run.json`: what this run was made from and with; an existing one must be of the same data.

    Args:
        quartiles: of the prices, in dollars; predictions far from them are not published.

    Raises:
        DataError: the data are not those that the run was started with.
    """
    url = storage.join(run_url(config), "run.json")
    before = records.read(RunFacts, url)
    if before is not None:
        if before.data_sha256 != data_digest:
            raise DataError(
                f"the data have changed since run {config.name()} began: sha256 {data_digest[:12]}, "
                f"was {before.data_sha256[:12]}",
                "train on the new data under another --run-id",
            )
        return
    facts = {
        "run_id": config.name(),
        "variant": config.variant,
        "config_sha256": digest(asdict(config)),
        "data_sha256": data_digest,
        "dims": dict(dims),
        "price_quartiles": list(quartiles),
        "world_size": world_size,
        "revision": _revision(),
        "versions": {
            "fusion": __version__,
            "python": platform.python_version(),
            "torch": metadata.version("torch"),
            "numpy": metadata.version("numpy"),
        },
        "started": now(),
    }
    storage.write(url, storage.as_json(facts))


@dataclass(frozen=True)
class Lease:
    """The right to publish under a run. The newest attempt has it; `check` tells an older one that it has lost it."""

    url: str
    attempt: int
    token: str

    def check(self) -> None:
        """Raises SupersededError when a newer attempt has begun."""
        held = records.read_required(LeaseRecord, self.url)
        if held.token != self.token:
            raise SupersededError(
                f"attempt {held.attempt} of this run began while this one, {self.attempt}, was still running",
                "let the newer one finish; two jobs that run at once need a --run-id each",
            )


def take_lease(run: str) -> Lease:
    """Makes this the newest attempt of the run."""
    url, token = storage.join(run, "lease.json"), uuid.uuid4().hex
    while True:
        held = storage.read_version(url)
        number = 1 if held is None else 1 + records.parse(LeaseRecord, held[0], url).attempt
        data = storage.as_json({"attempt": number, "token": token, "started": now()})
        if storage.create(url, data) if held is None else storage.replace(url, data, held[1]):
            return Lease(url, number, token)


@contextmanager
def attempt(run: str) -> Iterator[Lease]:
    """Records the start and the end of one try at a run, with its log, whichever way it ends."""
    if not storage.honours_conditions(run):
        log.warning(event="store_ignores_conditions", reason="nothing keeps two attempts at this run from mixing")
    lease = take_lease(run)
    folder = storage.join(run, "attempts", str(lease.attempt))
    storage.write(storage.join(folder, "start.json"), storage.as_json({"attempt": lease.attempt, "started": now()}))
    end: dict[str, Any] = {"code": ExitCode.BUG}
    try:
        try:
            yield lease
            end["code"] = ExitCode.DONE
        except StopRequested:
            _check_progress(run, lease.attempt)
            raise
    except FusionError as error:
        end = end_of(error)
        raise
    except KeyboardInterrupt:
        end |= {"code": 128 + signal.SIGINT, "error": "interrupted"}
        raise
    except BaseException as error:
        end |= {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        record_end(lease, end)


def end_of(error: FusionError) -> dict[str, Any]:
    return {"code": error.code, "error": error.message, "to_do": error.remedy}


def record_end(lease: Lease, end: Mapping[str, Any]) -> None:
    """Writes `exit.json` and `log.txt` of an attempt."""
    run = lease.url.rpartition("/")[0]
    folder = storage.join(run, "attempts", str(lease.attempt))
    storage.write(storage.join(folder, "log.txt"), log.text().encode())
    facts = {"attempt": lease.attempt, **end, "step": _newest_step(run), "ended": now()}
    storage.write(storage.join(folder, "exit.json"), storage.as_json(facts))


def _newest_step(run: str) -> int:
    return max((found.manifest.step for found in manifests.committed(run)), default=-1)


def _check_progress(run: str, number: int) -> None:
    """Turns the third stop in a row without a newer checkpoint into an error: running again would not help."""
    step = _newest_step(run)
    for earlier in (number - 1, number - 2):
        url = storage.join(run, "attempts", str(earlier), "exit.json")
        end = records.read_if_whole(AttemptEnd, url, "attempt_damaged")
        if end is None or end.code != ExitCode.STOPPED or end.step != step:
            return
    raise FusionError(
        f"stopped three times in a row without a newer checkpoint than step {step}",
        "give the job more time before it is stopped, or lower --checkpoint-seconds",
    )


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
    if best is None or not _exists(settings.output, best):
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


def _run_of(output: str, pointer: Mapping[str, Any]) -> str:
    return storage.join(output, "runs", str(pointer.get("run_id")))


def _exists(output: str, pointer: Mapping[str, Any]) -> bool:
    return storage.exists(storage.join(_run_of(output, pointer), "config.json"))


def pointer_url(output: str, *parts: str) -> str:
    return storage.join(output, "pointers", *parts) + ".json"


def read_pointer(output: str, *parts: str) -> dict[str, Any] | None:
    """What is pointed to; None when nothing is, or the pointer is damaged."""
    data = storage.read_if_exists(pointer_url(output, *parts))
    return (data and _object(data)) or None


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = {}
    return value if isinstance(value, dict) else {}


def move_pointer(
    output: str,
    *parts: str,
    target: Mapping[str, Any],
    unless: Callable[[Mapping[str, Any]], bool] = lambda _: False,
) -> bool:
    """Points to `target`, by compare-and-swap, unless what it points to now is to be kept.

    Returns whether it points to `target` now.
    """
    url = pointer_url(output, *parts)
    while True:
        held = storage.read_version(url)
        current = {} if held is None else _object(held[0])
        if current and (target.items() <= current.items() or unless(current)):
            return target.items() <= current.items()
        data = storage.as_json({**target, "updated": now()})
        if storage.create(url, data) if held is None else storage.replace(url, data, held[1]):
            return True


def point_to_run(config: RunConfig, checkpoint_name: str, smape: float) -> None:
    """Makes the run its variant's latest, and its best when its validation SMAPE is the lowest of those that exist.

    A best run that validated on other rows (other data, seed or fold) is compared all the same, and the log says so.
    """
    target = {"run_id": config.name(), "checkpoint": checkpoint_name, "smape": smape}
    before = read_pointer(config.output, "runs", config.variant, "best")

    def is_kept(best: Mapping[str, Any]) -> bool:
        return best.get("smape", math.inf) <= smape and _exists(config.output, best)

    move_pointer(config.output, "runs", config.variant, "latest", target=target)
    is_best = move_pointer(config.output, "runs", config.variant, "best", target=target, unless=is_kept)
    if before and not _same_split(config, before):
        log.warning(
            event="compared_on_other_rows",
            other=before.get("run_id"),
            other_smape=before.get("smape"),
            smape=smape,
            is_best=is_best,
            to_do="name the run to predict with: --run-id",
        )


def _same_split(config: RunConfig, other: Mapping[str, Any]) -> bool:
    splits = [storage.join(run, "split.parquet") for run in (run_url(config), _run_of(config.output, other))]
    ours, theirs = map(storage.read_if_exists, splits)
    return theirs is None or ours == theirs


def _revision() -> str:
    if "FUSION_REVISION" in os.environ:  # an image has no git
        return os.environ["FUSION_REVISION"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_digest() -> str:
    """sha256 over the source files of this package."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    return digest({str(path.relative_to(folder)): storage.sha256(path.read_bytes()) for path in files})


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
