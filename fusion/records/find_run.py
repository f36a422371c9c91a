"""Finds the run that a command uses: the one that --run-dir or --run-id names, else the served run of the variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from fusion import storage
from fusion.command.settings import from_json
from fusion.config import ReadRunConfig, RunConfig
from fusion.errors import ConfigError, DataError, did_you_mean
from fusion.records import manifests
from fusion.records.best_run import pointed_to
from fusion.records.output import OutputFolder
from fusion.records.run import CONFIG, RunFolder, config_digest

C = TypeVar("C", bound=RunConfig)


def _find_run(settings: ReadRunConfig, variant: str) -> tuple[RunFolder, str]:
    """Folder of the run to use, and the name of its best checkpoint if the pointer says it; else an empty name.

    Raises:
        DataError: neither --run-dir nor --run-id was given, and no run of the variant has finished.
    """
    if settings.run_dir:
        return RunFolder(settings.run_dir.rstrip("/")), ""
    if settings.run_id:
        return RunFolder.named(settings.output, settings.run_id), ""
    best = pointed_to(settings.output, variant)
    if best is None:
        raise _no_finished_run(settings.output, variant)
    return RunFolder.named(settings.output, best.run_id), best.checkpoint


def _no_finished_run(output: str, variant: str) -> DataError:
    return DataError(
        f"no finished run of {variant} under {output}",
        f"train one with `python -m fusion.{variant}.train`, or name one with --run-dir",
    )


def no_run(output: str, run_id: str) -> DataError:
    """The error for a run id that does not exist; its hint suggests the most similar id."""
    known = {run.run_id for run in OutputFolder(output).runs()} - {run_id}
    near = did_you_mean(run_id, sorted(known))
    return DataError(
        f"no run {run_id} under {output}", f"{near}`python jobs/pull.py runs --output {output}` lists what is there"
    )


def open_run(settings: ReadRunConfig, config_class: type[C]) -> tuple[RunFolder, C, manifests.Checkpoint]:
    """Folder of the run to use, the settings it was started with, and its best checkpoint.

    Raises:
        DataError: the run does not exist, or its `config.json` is not the one that the checkpoint was trained with.
        ConfigError: the run is of another variant than `config_class`.
    """
    run, named = _find_run(settings, config_class.variant)
    url = run.at(CONFIG)
    content = storage.read(url) if settings.run_dir else storage.read_if_exists(url)
    if content is None and not settings.run_id:  # the pointer names a run that was deleted
        raise _no_finished_run(settings.output, config_class.variant)
    _check_variant(run, config_class.variant)
    if content is None:
        raise no_run(settings.output, run.run_id)
    config = from_json(config_class, content, url)
    best = run.best(named)
    if config_digest(json.loads(content)) != best.manifest.config_sha256:
        raise DataError(
            f"{url} has other settings than {best.name} was trained with",
            "restore it, or name another run with --run-id",
        )
    return run, config, best


def data_of(settings: ReadRunConfig, of_run: str) -> str:
    """URL or folder of the input data: `--data`, else `of_run`, from which the run was trained.

    Raises:
        DataError: `of_run` is a local folder that does not exist on this machine.
    """
    if settings.data:
        return settings.data
    if "://" not in of_run and not Path(of_run).is_dir():
        relative = "" if Path(of_run).is_absolute() else ", as seen from where its training was started"
        raise DataError(
            f"the run was trained from the folder {of_run}{relative}, which does not exist here",
            "name the folder with --data",
        )
    return of_run


def _check_variant(run: RunFolder, variant: str) -> None:
    facts = run.facts_if_whole()
    if facts is not None and facts.variant != variant:
        raise ConfigError(
            f"run {run.run_id} is of {facts.variant}, and this command is of {variant}",
            f"use the commands of that variant, such as python -m fusion.{facts.variant}.predict_test",
        )
