"""`train(config, build_network)`: the training loop, from embeddings to a committed model, on any number of ranks.

If a training was stopped or killed, the same command resumes it from the newest committed checkpoint. If the run is
already finished, the command changes nothing and says so.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch

from fusion import log
from fusion.command.exit import recorded_by
from fusion.config import RunConfig
from fusion.distributed.watchdog import Watchdog, watched
from fusion.distributed.world import World, join_world
from fusion.errors import DataError
from fusion.prediction.predict import BuildNetwork, C, make_model
from fusion.records import manifests
from fusion.records.attempts import Lease, attempt, end_of, record_end
from fusion.records.baselines import scores_of
from fusion.records.best_run import point_to_run
from fusion.records.manifests import MODEL, Checkpoint
from fusion.records.run import RunFolder
from fusion.records.schemas import Baselines
from fusion.records.start import start_run
from fusion.report.publish import report_if_missing, try_report
from fusion.tracking import Followers, figures, following, trackers_of
from fusion.training import outcome
from fusion.training.baselines import baselines
from fusion.training.dataset import read_data, statistics
from fusion.training.memory_build import build_memory
from fusion.training.outcome import Outcome
from fusion.training.pace import Pace, progress_text, seconds_left
from fusion.training.saver import Saver
from fusion.training.seeds import set_seed
from fusion.training.trainer import Fit


def train(config: C, build_network: BuildNetwork[C]) -> None:
    """Trains a run, commits checkpoints under `<output>/runs/<run id>`, and writes its report.

    If the run is finished, only writes the report, if there is none.

    Args:
        build_network: makes the variant's network from the config and the dimension of each role.

    Raises:
        DataError, ConfigError, CredentialsError, UnreachableError: raised by the modules that this one calls.
        DivergedError: the loss or the validation SMAPE is not finite.
        StopRequested: a signal asked to stop; the steps that were taken are committed.
        SupersededError: a newer attempt at the same run has begun.
    """
    with join_world(config.device, config.stall_timeout) as world:
        log.configure(config.name(), world.rank, world.size)
        is_main, made = world.is_main, world.on_main(lambda: _finished(config))
        ended = _attempt(config, build_network, world) if made is None else None
    if is_main:  # the other ranks need not wait for it
        _conclude(config, made, ended)


def _finished(config: RunConfig) -> Checkpoint | None:
    """Starts or checks the run's folder; returns its last checkpoint if the training is finished.

    A finished checkpoint with a damaged model does not count, so that the training makes it again.
    """
    start_run(config)
    for made in reversed(RunFolder.of(config).checkpoints()):
        if made.manifest.finished and manifests.is_whole(made, MODEL):
            point_to_run(config, made)  # an attempt may have been killed after this checkpoint, before the pointers
            return made
    return None


def _conclude(config: RunConfig, made: Checkpoint | None, ended: Outcome | None) -> None:
    """Writes the report, and shows how the training ended.

    Args:
        made: the last checkpoint, if the run was finished before.
        ended: the outcome of this attempt, if it was not.
    """
    run = RunFolder.of(config)
    if made is not None:
        report_if_missing(run)
        ended = outcome.read_outcome(made)
        hint = " or ".join(f"`{command}`" for command in outcome.next_commands(config))
        outcome.say(ended, "finished_before", folder=run, hint=hint)
        _follow_finished(config, ended)
    else:
        try_report(run)
    if ended is not None:
        outcome.show(ended, config)


def _follow_finished(config: RunConfig, ended: Outcome) -> None:
    """Reports a finished run to its trackers, of which the attempt may have been killed too early, or which are new."""
    trackers = trackers_of(config, ended.run)
    if not trackers:
        return
    with following(config, trackers) as followers:
        followers.summary = {**scores_of(ended.baselines), "smape": ended.smape}
        try:
            entries = ended.run.history()
        except DataError as error:
            log.warning(event="run_damaged", reason=error.message)
            entries = []
        for entry in entries:
            followers.epoch(entry["epoch"], figures(entry))


def _attempt(config: C, build_network: BuildNetwork[C], world: World) -> Outcome | None:
    """Trains the run as one attempt, whose start and end are recorded; returns its outcome, on rank 0."""
    with attempt(RunFolder.of(config)) if world.is_main else nullcontext() as lease:
        record = None if lease is None else lambda error: record_end(lease, end_of(error))
        with recorded_by(record):
            return _train(config, build_network, world, lease)


def _train(config: C, build_network: BuildNetwork[C], world: World, lease: Lease | None) -> Outcome | None:
    """Reads the data, makes the model and its memory, resumes if there is a checkpoint, and trains to the end."""
    begun = time.monotonic()
    trackers = world.on_main_alone(lambda: trackers_of(config, RunFolder.of(config)))
    data = read_data(config, world)
    set_seed(config.seed)
    model = make_model(config, build_network, data.store.dims)
    model.calibrate({role: statistics(data, role, world) for role in data.store.dims}, data.targets[data.train])
    with log.waiting("finding similar rows"):
        data = build_memory(config, model, data, world)
    fit = Fit(config, model.to(world.device), data, world)
    _log_start(fit)
    known = baselines(fit)
    saver = Saver(config, fit, lease)
    saver.resume()
    fit.steps.choose_precision()
    # The watchdog starts here, because reads from the store, above, have their own time limits.
    stalled = watched(config.stall_timeout, lambda: f"rank {world.rank} at step {fit.step}")
    with following(config, trackers or {}) as followers, stalled as watchdog:
        followers.summary = scores_of(known)
        _run_epochs(fit, saver, watchdog, followers)
        followers.summary["smape"] = fit.smape
        if fit.stopping.stopped:
            log.info(event="early_stop", epoch=fit.epoch, smape=fit.smape)
        made = saver.finish()
    return None if made is None else _outcome(fit, saver, made, known, time.monotonic() - begun)


def _outcome(fit: Fit, saver: Saver, made: Checkpoint, known: Baselines | None, seconds: float) -> Outcome:
    """Logs how the training ended, and returns it.

    Args:
        seconds: that this attempt has taken.
    """
    found = Outcome(
        saver.run,
        fit.smape,
        outcome.interval_of_fit(fit),
        len(fit.data.validation),
        tuple(entry["smape"] for entry in fit.history),
        outcome.minutes_of(saver.run, seconds),
        known,
    )
    blocked = saver.blocked / (time.monotonic() - saver.started)
    outcome.say(found, "finished", checkpoint=made.url, blocked=blocked)
    return found


def _run_epochs(fit: Fit, saver: Saver, watchdog: Watchdog, followers: Followers) -> None:
    for entry in fit.history:  # of earlier attempts, of which one may have been killed before it reported its last
        followers.epoch(entry["epoch"], figures(entry))
    pace = Pace()
    n_steps = fit.config.epochs * fit.n_batches
    with log.progress(progress_text(fit, pace), n_steps, done=fit.step, estimates=False) as show:
        while not fit.finished:
            rows_s = _run_epoch(fit, saver, watchdog, pace, show)
            followers.epoch(fit.epoch, figures(fit.history[-1]) | {"rows_s": rows_s})
            if not fit.finished:
                saver.agree()


def _run_epoch(fit: Fit, saver: Saver, watchdog: Watchdog, pace: Pace, show: log.Show) -> float:
    """Trains on the rest of the epoch, validates, and logs the epoch; returns the rows per second."""
    begun = time.monotonic()
    n_rows = len(fit.data.train) - min(fit.batch * fit.config.batch_size, len(fit.data.train))
    _train_epoch(fit, saver, watchdog, pace, show)
    trained = time.monotonic()
    facts = fit.end_epoch(trained - begun, watchdog.beat)
    watchdog.beat()
    ended = time.monotonic()
    pace.validated(ended - trained)
    show(fit.step, progress_text(fit, pace))
    left = seconds_left(fit, pace)
    estimate = {} if left is None else {"eta_s": left}
    rows_s = n_rows / (ended - begun)
    log.info(**facts, rows_s=rows_s, **estimate)
    return rows_s


def _train_epoch(fit: Fit, saver: Saver, watchdog: Watchdog, pace: Pace, show: log.Show) -> None:
    """Trains on the rest of the epoch and saves when a save is due."""
    step, started = fit.step, time.monotonic()

    def measure() -> None:
        """Adds the steps taken since the last call to `pace`, and their time, including that of saving."""
        nonlocal step, started
        now = time.monotonic()
        pace.trained(fit.step - step, now - started)
        step, started = fit.step, now

    for _ in fit.run_epoch(watchdog.beat):
        saver.agree()
        watchdog.beat()
        measure()
        show(fit.step, progress_text(fit, pace))
    saver.agree(may_save=False)  # only adds up the losses: the epoch is saved after its validation
    measure()


def _log_start(fit: Fit) -> None:
    config = fit.config
    log.info(
        event="start",
        parameters=sum(p.numel() for p in fit.model.parameters()),
        mflop_per_row=fit.flop_per_row() / 1e6,
        steps_per_epoch=fit.n_batches,
        device=fit.world.device,
        threads=torch.get_num_threads(),
        loss=config.loss,
        batch_size=config.batch_size,
        shuffle=config.shuffle,
        lr=config.lr,
    )
