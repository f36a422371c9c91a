"""`load`: opens a finished run in a bucket, in a folder, or one that was pulled."""

from __future__ import annotations

import os

from fusion import log, storage
from fusion.api.model import Model, Opened
from fusion.api.pricers import EnsemblePricer, RunPricer
from fusion.api.session import session
from fusion.api.settings import configured
from fusion.config import PredictConfig, ReadRunConfig, RunConfig
from fusion.distributed.world import alone
from fusion.ensemble.prediction import intervals_in, models_of, open_ensemble
from fusion.errors import ConfigError, DataError, did_you_mean
from fusion.prediction.predict import features_of, load_model
from fusion.records import find_run, intervals, pointers
from fusion.records.best_run import SERVED
from fusion.records.manifests import ENSEMBLE
from fusion.records.output import OutputFolder
from fusion.records.run import CONFIG, RunFolder
from fusion.records.schemas import ENSEMBLE_VARIANT, RunPointer
from fusion.variants import config_class_of, network_for, variants

BEST, LATEST = "best", "latest"


def load(
    location: str | os.PathLike[str],
    variant: str | type[RunConfig] | None = None,
    *,
    run: str = BEST,
    device: str = "auto",
    store_timeout: float = 60.0,
) -> Model:
    """Opens a trained run.

    >>> model = fusion.load("s3://bucket/output", "all_embeddings")  # doctest: +SKIP
    >>> model = fusion.load("s3://bucket/output", run="all-embeddings-f96859b0")  # doctest: +SKIP
    >>> model = fusion.load("pulled/runs/all-embeddings-f96859b0")  # doctest: +SKIP

    Args:
        location: bucket or folder that runs were written to (`--output`), or the folder of a single run.
        variant: "all_embeddings", "qwen_clip", "ensemble", or the Config class of a variant of your own; by default
            that of the run, or the only one that has a finished run.
        run: "best", which is the run that `predict_test` would use; "latest"; or the id of a run.
        device: auto, cpu, cuda or cuda:N.
        store_timeout: seconds to retry a store that does not answer.

    Raises:
        DataError: there is no such run, or a file of it is damaged.
        ConfigError: the run is of another variant, or `device` is not there.
        CredentialsError, UnreachableError: the store refuses, or does not answer.
    """
    with session(store_timeout):
        place, folder = os.fspath(location), _run_folder(os.fspath(location), run)
        if folder is None:
            run_id = _run_id(place, variant, run)
            folder = None if run_id is None else RunFolder.named(place, run_id)
        if folder is None and variant is None:
            variant = _only_variant(place, SERVED)
        given = {"output": place, "device": device, "store_timeout": store_timeout}
        if folder is not None:
            given |= {"run_dir": folder.url} if folder.url == place.rstrip("/") else {"run_id": folder.run_id}
        if variant == ENSEMBLE_VARIANT or (folder is not None and storage.exists(folder.at(ENSEMBLE))):
            return _opened_ensemble(configured(PredictConfig, given))
        return opened(configured(ReadRunConfig, given), _config_class(place, variant, folder))


def opened(settings: ReadRunConfig, config_class: type[RunConfig]) -> Model:
    """The run that the settings name; call it within a session."""
    with alone(settings.device) as world:
        run, config, chosen = find_run.open_run(settings, config_class)
        log.configure(run.run_id, world.rank, world.size)
        features = features_of(run, config, chosen)
        network = load_model(chosen, config, network_for(config_class), world)
        limits = intervals.intervals_of(chosen)
        pricer = RunPricer(network, config.bindings(), features, limits, config.max_missing)
        return Model(Opened(run, config.variant, chosen.smape, pricer, world.device, config, chosen))


def _opened_ensemble(settings: PredictConfig) -> Model:
    """The ensemble that the settings name, or the best one."""
    with alone(settings.device) as world:
        folder, record, members = open_ensemble(settings)
        log.configure(record.run_id, world.rank, world.size)
        pricer = EnsemblePricer(members, models_of(members, world), intervals_in(folder))
        weights = {storage.base(member.run): member.weight for member in record.members}
        return Model(Opened(folder, ENSEMBLE_VARIANT, record.smape, pricer, world.device, members=weights))


def _run_folder(place: str, run: str) -> RunFolder | None:
    """The location as the folder of a run; None if it is an output.

    Raises:
        ConfigError: it is the folder of a run, and `run` names another one.
    """
    if not any(storage.exists(storage.join(place, name)) for name in (CONFIG, ENSEMBLE)):
        return None
    folder = RunFolder(place.rstrip("/"))
    if run not in (BEST, folder.run_id):
        raise ConfigError(f"{place} is the run {folder.run_id}, but run is {run!r}", "leave out run")
    return folder


def _run_id(output: str, variant: str | type[RunConfig] | None, run: str) -> str | None:
    """The id of the run that was asked for; None if it is the best of its variant.

    Raises:
        DataError: the variant has no finished run.
    """
    if run == BEST:
        return None
    if run != LATEST:
        return run
    name = _only_variant(output, LATEST) if variant is None else _name(variant)
    pointer = pointers.read(RunPointer, output, "runs", name, LATEST)
    if pointer is None:
        raise _nothing_finished(output, name)
    return pointer.run_id


def _name(variant: str | type[RunConfig]) -> str:
    return variant if isinstance(variant, str) else variant.variant


def _config_class(output: str, variant: str | type[RunConfig] | None, folder: RunFolder | None) -> type[RunConfig]:
    """The class of the run's settings."""
    if isinstance(variant, type):
        return variant
    if variant is not None and variant not in variants():
        near = did_you_mean(variant, variants())
        raise ConfigError(f"there is no variant {variant!r}", f"{near}use one of {', '.join(variants())}")
    if variant is not None:
        return config_class_of(variant)
    assert folder is not None, "without a variant, there is a run"
    if not folder.exists():
        raise find_run.no_run(output, folder.run_id)
    name = folder.variant()
    if not name:
        raise DataError(f"{folder} has not read its data yet", "let its training finish, or load another run")
    return config_class_of(name)


def _only_variant(output: str, pointer: str) -> str:
    """The variant with a finished run or ensemble, if there is only one.

    Raises:
        DataError: there is none.
        ConfigError: there are several.
    """
    found = [folder.name for folder in OutputFolder(output).ls("pointers", "runs")]
    names = [name for name in found if pointers.read(RunPointer, output, "runs", name, pointer) is not None]
    if not names:
        raise _nothing_finished(output, "any variant")
    if len(names) > 1:
        hint = f"name one: fusion.load({output!r}, {names[0]!r})"
        raise ConfigError(f"{output} has runs of {' and of '.join(names)}", hint)
    return names[0]


def _nothing_finished(output: str, variant: str) -> DataError:
    folders = [run.run_id for run in OutputFolder(output).runs()]
    holds = f"it has the runs {', '.join(folders[:5])}" if folders else "it has no runs, or does not exist"
    message = f"no finished run of {variant} under {output}: {holds}"
    return DataError(message, "name the output of a training, or train a model with fusion.train")
