"""`train`: trains a run as the command does, from files or from a data frame and arrays, and returns its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusion import log, training
from fusion.api.dataset import write_training_data
from fusion.api.loading import opened
from fusion.api.model import Model
from fusion.api.session import interruptible, session
from fusion.config import ReadRunConfig, RunConfig
from fusion.errors import ConfigError
from fusion.records.run import RunFolder
from fusion.variants import network_for


def train(
    config: RunConfig, table: Any = None, sources: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> Model:
    """Trains a run and returns its model; a run that is finished is not trained again.

    >>> config = fusion.make_config("all_embeddings", data="data", output="output", epochs=10)  # doctest: +SKIP
    >>> model = fusion.train(config, frame, {"clip_image": images, …})  # doctest: +SKIP

    The run is the one that the command `fusion train` with the same settings makes, and all commands can use it.
    If the training is interrupted (Ctrl-C, or "interrupt the kernel"), it commits what it has done and raises
    `StopRequested`. The same call continues, as it does after a crash.

    Args:
        config: the settings, from `fusion.make_config` or a variant's Config.
        table: N products to train on, as a frame of pandas, polars or pyarrow, with the columns sample_id and price
            and any others, which can be grouped by. It is written to `config.data` as `train.parquet`, unless the
            folder has the same already. Left out: `config.data` has the data.
        sources: the embeddings of each role of the variant, as for `Model.predict`. They are written to
            `config.data` as `embeddings/train/<source>.parquet`.
        quiet: whether only warnings are shown, and not the log of the training.

    Returns:
        The model with the best weights of the run.

    Raises:
        DataError: the data cannot be used, or `config.data` holds other data than was given. Nothing is overwritten.
        ConfigError: only one of `table` and `sources` is given, or the run exists with other settings.
        StopRequested: the training was interrupted.
        DivergedError: the loss or the validation SMAPE is not finite.
    """
    if not isinstance(config, RunConfig):
        hint = 'make the settings with fusion.make_config("all_embeddings", epochs=10)'
        raise ConfigError(f"config is a {type(config).__name__}, expected settings", hint)
    if (table is None) != (sources is None):
        given, other = ("table", "sources") if sources is None else ("sources", "table")
        raise ConfigError(
            f"{given} is given without {other}", "give both, or none to train on the files in config.data"
        )
    build_network = network_for(type(config))
    with session(config.store_timeout, shown="warning" if quiet else "info"):
        if table is not None and sources is not None:
            write_training_data(config, table, sources)
        with interruptible():
            training.train(config, build_network)
        where = ReadRunConfig(output=config.output, run_dir=RunFolder.of(config).url, device=config.device)
        with log.separate("warning"):
            return opened(where, type(config))
