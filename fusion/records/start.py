"""Writes what identifies a run: `config.json` when it starts, and `run.json` once its data are read.

Each is written once. When a run is resumed, its settings and data must be the same as before.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

from fusion import __version__, storage
from fusion.command.settings import from_json, to_json
from fusion.config import HOW, RunConfig
from fusion.errors import ConfigError, DataError
from fusion.records import schemas
from fusion.records.provenance import code_digest, revision
from fusion.records.run import CONFIG, FACTS, RunFolder, config_digest
from fusion.records.schemas import RunFacts


def start_run(config: RunConfig) -> None:
    """Writes `config.json`, the first file of a run, or checks that an existing one has the same settings.

    Raises:
        ConfigError: the run exists with other settings, or it exists and --fresh was given.
    """
    run = RunFolder.of(config)
    url = run.at(CONFIG)
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
    if not storage.exists(run.at(FACTS)):
        # No attempt has read the data yet, perhaps because --data was wrong, so --data may still change.
        storage.write(url, to_json(config).encode())


@dataclass(frozen=True)
class Read:
    """What an attempt has read, and on how many ranks.

    Attributes:
        digest: of the rows of `train.csv` and of their embeddings.
        dims: role to the dimension of its embeddings.
        quartiles: of the prices in `train.csv`, in dollars; nights whose prices are far from them are not published.
        world_size: number of ranks.
        n_nodes: number of nodes between which rows are divided; None if every node has all rows.
    """

    digest: str
    dims: Mapping[str, int]
    quartiles: Sequence[float]
    world_size: int
    n_nodes: int | None


def describe_run(config: RunConfig, read: Read) -> None:
    """Writes `run.json`: digests of settings, data and code, dimensions and versions.

    If `run.json` exists, only checks that the data have not changed.

    Raises:
        ConfigError: the rows are divided between another number of nodes than before.
        DataError: the data are not those that the run was started with.
    """
    run = RunFolder.of(config)
    before = run.facts()
    if before is None:
        facts = _facts(config, read)
        storage.write(run.at(FACTS), schemas.seal(schemas.written(facts)))
    elif before.data_sha256 != read.digest:
        raise DataError(
            f"the data have changed since run {config.name()} began: sha256 {read.digest[:12]}, "
            f"was {before.data_sha256[:12]}",
            "train on the new data under another --run-id",
        )
    elif before.n_nodes != read.n_nodes:
        raise ConfigError(
            f"run {config.name()} divides its rows between {before.n_nodes} nodes, now there are {read.n_nodes}",
            f"start it on {before.n_nodes} nodes, or train under another --run-id",
        )


def _facts(config: RunConfig, read: Read) -> RunFacts:
    """The content of `run.json`."""
    low, median, high = read.quartiles
    return RunFacts(
        run_id=config.name(),
        variant=config.variant,
        config_sha256=config_digest(asdict(config)),
        config_json_sha256=storage.sha256(storage.read(RunFolder.of(config).at(CONFIG))),
        code_sha256=code_digest("training"),
        data_sha256=read.digest,
        dims=dict(read.dims),
        price_quartiles=(low, median, high),
        world_size=read.world_size,
        n_nodes=read.n_nodes,
        revision=revision(),
        versions={
            "fusion": __version__,
            "python": platform.python_version(),
            "torch": metadata.version("torch"),
            "numpy": metadata.version("numpy"),
        },
        started=schemas.now(),
    )
