"""The folder of a run: where it is, what it was started with, and how its attempts ended."""

from __future__ import annotations

import difflib
import json
import platform
import signal
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from fusion import __version__, log, storage
from fusion.command.settings import from_json, to_json
from fusion.config import HOW, ReadRunConfig, RunConfig, digest
from fusion.errors import LOST_PEER, ConfigError, DataError, ExitCode, FusionError, StopRequested, SupersededError
from fusion.records import manifests, schemas
from fusion.records.best_run import pointed_to, run_of
from fusion.records.contention import turns
from fusion.records.provenance import code_digest, revision
from fusion.records.schemas import AttemptEnd, LeaseRecord, RunFacts

C = TypeVar("C", bound=RunConfig)

PATIENCE_AT_THE_END = 5.0  # seconds to retry a silent store when an attempt has failed or was stopped


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
    before = schemas.read(RunFacts, url)
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
        "config_sha256": config_digest(asdict(config)),
        "config_json_sha256": storage.sha256(storage.read(storage.join(run_url(config), "config.json"))),
        "code_sha256": code_digest("training"),
        "data_sha256": data_digest,
        "dims": dict(dims),
        "price_quartiles": list(quartiles),
        "world_size": world_size,
        "revision": revision(),
        "versions": {
            "fusion": __version__,
            "python": platform.python_version(),
            "torch": metadata.version("torch"),
            "numpy": metadata.version("numpy"),
        },
        "started": schemas.now(),
    }
    storage.write(url, schemas.seal(facts))


@dataclass(frozen=True)
class Lease:
    """The right to publish under a run. The newest attempt has it; `check` tells an older one that it has lost it."""

    url: str
    attempt: int
    token: str

    def check(self) -> None:
        """Raises SupersededError when a newer attempt has begun."""
        held = schemas.read_required(LeaseRecord, self.url)
        if held.token != self.token:
            raise SupersededError(
                f"attempt {held.attempt} of this run began while this one, {self.attempt}, was still running",
                "let the newer one finish; two jobs that run at once need a --run-id each",
            )


def take_lease(run: str) -> Lease:
    """Makes this the newest attempt of the run."""
    url, token = storage.join(run, "lease.json"), uuid.uuid4().hex
    for _ in turns(url):
        held = storage.read_version(url)
        number = 1 if held is None else 1 + schemas.parse(LeaseRecord, held[0], url).attempt
        data = schemas.seal({"attempt": number, "token": token, "started": schemas.now()})
        if storage.create(url, data) if held is None else storage.replace(url, data, held[1]):
            return Lease(url, number, token)
    raise AssertionError("the turns end with an error")


@contextmanager
def attempt(run: str) -> Iterator[Lease]:
    """Records the start and the end of one try at a run, with its log, whichever way it ends."""
    storage.honours_conditions(run)  # or the log says that nothing keeps two attempts at this run from mixing
    lease = take_lease(run)
    folder = storage.join(run, "attempts", str(lease.attempt))
    start = {"attempt": lease.attempt, "started": schemas.now()}
    storage.write(storage.join(folder, "start.json"), schemas.seal(start))
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
        end |= _unexpected_end(error)
        raise
    finally:
        record_end(lease, end)


def _unexpected_end(error: BaseException) -> dict[str, Any]:
    """A bug; or, where another rank was lost, what the launcher ends with then."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, RuntimeError) and LOST_PEER.search(said):
        hint = "see how the other ranks ended; the same command goes on from the last checkpoint"
        return {"code": 128 + signal.SIGKILL, "error": f"another rank was lost: {said}", "hint": hint}
    return {"error": said}


def end_of(error: FusionError) -> dict[str, Any]:
    return {"code": error.code, "error": error.message, "hint": error.remedy}


def record_end(lease: Lease, end: Mapping[str, Any]) -> None:
    """Writes `exit.json` and `log.txt` of an attempt. A store that does not answer is no other end of it: a warning."""
    run = lease.url.rpartition("/")[0]
    folder = storage.join(run, "attempts", str(lease.attempt))
    if end["code"] != ExitCode.DONE:
        storage.set_patience(min(PATIENCE_AT_THE_END, storage.patience()))  # the kill after a stop may be near
    try:
        (said,) = manifests.write_files(folder, {"log.txt": log.text().encode()})
        facts = {"attempt": lease.attempt, **end, "step": _newest_step(run), "ended": schemas.now()}
        storage.write(storage.join(folder, "exit.json"), schemas.seal(facts | {"log": asdict(said)}))
    except FusionError as error:
        log.warning(event="end_not_recorded", reason=error.message)


def _newest_step(run: str) -> int:
    return max((found.manifest.step for found in manifests.committed(run)), default=-1)


def _check_progress(run: str, number: int) -> None:
    """Turns the third stop in a row without a newer checkpoint into an error: running again would not help."""
    step = _newest_step(run)
    for earlier in (number - 1, number - 2):
        url = storage.join(run, "attempts", str(earlier), "exit.json")
        end = schemas.read_if_whole(AttemptEnd, url, "attempt_damaged")
        if end is None or end.code != ExitCode.STOPPED or end.step != step:
            return
    raise FusionError(
        f"stopped three times in a row without a newer checkpoint than step {step}",
        "give the job more time before it is stopped, or lower --checkpoint-seconds",
    )


def _find_run(settings: ReadRunConfig, variant: str) -> tuple[str, str]:
    """URL of the run to use: `--run-dir`, else `--run-id`, else the one of the variant that is served.

    And the name of the checkpoint to use, if it is known without a look at them all.
    """
    if settings.run_dir:
        return settings.run_dir.rstrip("/"), ""
    if settings.run_id:
        return storage.join(settings.output, "runs", settings.run_id), ""
    best = pointed_to(settings.output, variant)
    if best is None:
        raise _no_finished_run(settings.output, variant)
    return run_of(settings.output, best), best.checkpoint


def _no_finished_run(output: str, variant: str) -> DataError:
    return DataError(
        f"no finished run of {variant} under {output}",
        f"train one with `python -m fusion.{variant}.train`, or name one with --run-dir",
    )


def no_run(output: str, run_id: str) -> DataError:
    """The error that there is no run of this id, with the nearest that exists."""
    known = {storage.base(url) for url in storage.ls(storage.join(output, "runs"))} - {run_id}
    near = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(run_id, sorted(known), n=1))
    return DataError(
        f"no run {run_id} under {output}", f"{near}`python jobs/pull.py runs --output {output}` lists what is there"
    )


def open_run(settings: ReadRunConfig, config_class: type[C]) -> tuple[str, C, manifests.Checkpoint]:
    """URL of the run to use, the settings it was started with, and its best checkpoint.

    Raises:
        DataError: there is no such run, or its config is not the one that the checkpoint was trained with.
        ConfigError: it belongs to another variant.
    """
    run, named = _find_run(settings, config_class.variant)
    url = storage.join(run, "config.json")
    content = storage.read(url) if settings.run_dir else storage.read_if_exists(url)
    if content is None and not settings.run_id:  # the run that is pointed to was deleted
        raise _no_finished_run(settings.output, config_class.variant)
    _check_variant(run, config_class.variant)
    if content is None:
        raise no_run(settings.output, storage.base(run))
    config = from_json(config_class, content, url)
    best = manifests.best(run, named)
    if config_digest(json.loads(content)) != best.manifest.config_sha256:
        raise DataError(
            f"{url} has other settings than {best.name} was trained with",
            "restore it, or name another run with --run-id",
        )
    return run, config, best


def data_of(settings: ReadRunConfig, of_run: str) -> str:
    """Where the input is: `--data`, else `of_run`, where the run had it.

    Raises:
        DataError: the run had it in a folder that is not here.
    """
    if settings.data:
        return settings.data
    if "://" not in of_run and not Path(of_run).is_dir():
        relative = "" if Path(of_run).is_absolute() else ", as seen from where its training was started"
        raise DataError(
            f"the run's data are in the folder {of_run}{relative}, and here is none", "name the folder with --data"
        )
    return of_run


def _check_variant(run: str, variant: str) -> None:
    facts = schemas.read_if_whole(RunFacts, storage.join(run, "run.json"), "run_damaged")
    if facts is not None and facts.variant != variant:
        raise ConfigError(
            f"run {storage.base(run)} is of {facts.variant}, and this command is of {variant}",
            f"use the commands of that variant, such as python -m fusion.{facts.variant}.predict_test",
        )


def config_digest(settings: Mapping[str, Any]) -> str:
    """sha256 of the settings that decide what a run computes, wherever its data lie."""
    return digest({key: value for key, value in settings.items() if key not in HOW | {"data"}})
