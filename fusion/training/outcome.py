"""How a training ended: in words on one screen of a terminal, and as a line of the log."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

import numpy as np

from fusion import log, storage
from fusion.compare.standard_errors import smape_interval
from fusion.config import RunConfig
from fusion.errors import DataError, FusionError
from fusion.metrics import readable, row_smape
from fusion.records.baselines import in_words, scores_of
from fusion.records.manifests import EPOCHS, VALIDATION, Checkpoint
from fusion.records.run import RunFolder
from fusion.records.schemas import Baselines
from fusion.records.split import validation_groups
from fusion.records.validation import validation_of
from fusion.terminal import tables
from fusion.terminal.spelling import as_typed
from fusion.training.trainer import Fit

# A validation SMAPE differs from epoch to epoch by about 0.5% of itself without getting better or worse. So the mean
# of the last quarter of the epochs is compared with that of the quarter before, and has to be lower by as much.
PROGRESS = 0.005
# A finished run is read again to say how good it is. Its interval needs the validation rows; it is left out if they
# take seconds to read.
MOST_READ = 32 << 20  # bytes


@dataclass(frozen=True)
class Outcome:
    """The result of a finished training.

    Attributes:
        smape: of the weights that were kept, on the validation rows, in %.
        interval: 95% interval of `smape` by groups of near-duplicates; None if it is not known.
        rows: number of validation rows; 0 if not known.
        history: the SMAPE after each epoch.
        minutes: that all attempts took together, without those that were killed; None if not known.
        baselines: what the run has to beat; None if it is not known.
    """

    run: RunFolder
    smape: float
    interval: tuple[float, float] | None
    rows: int
    history: tuple[float, ...]
    minutes: float | None
    baselines: Baselines | None

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, with the SMAPE that was kept; the last of several."""
        return max([epoch for epoch, smape in enumerate(self.history, 1) if smape == self.smape], default=0)

    @property
    def was_improving(self) -> bool:
        """Whether the SMAPE was still falling at the end, so that more epochs would probably help."""
        quarter = max(1, len(self.history) // 4)
        last, before = self.history[-quarter:], self.history[-2 * quarter : -quarter]
        return not before or float(np.mean(last)) < float(np.mean(before)) * (1 - PROGRESS)

    def facts(self) -> dict[str, object]:
        """Fields for a line of the log."""
        low_high = dict(zip(("smape_low", "smape_high"), self.interval or (), strict=False))
        epochs = {"best_epoch": f"{self.best_epoch}/{len(self.history)}"} if self.history else {}
        improving = {"improving": "yes" if self.was_improving else "no"} if self.history else {}
        minutes = {} if self.minutes is None else {"minutes": self.minutes}
        return {"smape": self.smape, **low_high, **scores_of(self.baselines), **epochs, **improving, **minutes}


def interval_of_fit(fit: Fit) -> tuple[float, float] | None:
    """95% interval of the SMAPE of the kept weights; None if a resumed attempt has not predicted with them."""
    if fit.validated is None:
        return None
    errors = row_smape(fit.data.prices, fit.validated["price"])
    return smape_interval(errors, fit.data.groups[fit.data.validation].numpy())


def minutes_of(run: RunFolder, seconds: float) -> float | None:
    """Minutes of all attempts at a run, of which the current one has taken `seconds`; None if that cannot be read."""
    try:
        return (run.minutes() or 0.0) + seconds / 60
    except FusionError as error:
        log.warning(event="minutes_unknown", reason=error.message)
        return None


def read_outcome(made: Checkpoint) -> Outcome:
    """The outcome of a run that was finished before, from its last checkpoint; only its SMAPE if others are damaged."""
    run = RunFolder.of_checkpoint(made)
    try:
        interval, rows = _read_interval(run, made)
        smapes = tuple(float(entry["smape"]) for entry in run.history())
        return Outcome(run, made.smape, interval, rows, smapes, run.minutes(), run.baselines())
    except DataError as error:
        log.warning(event="run_damaged", reason=error.message)
        return Outcome(run, made.smape, None, 0, (), None, None)


def _read_interval(run: RunFolder, made: Checkpoint) -> tuple[tuple[float, float] | None, int]:
    """Interval and number of validation rows; (None, 0) if they are not known, or would take long to read."""
    n_bytes = sum(entry.bytes for entry in made.manifest.files if entry.key == VALIDATION)
    groups = validation_groups(run, made.manifest.split_sha256) if 0 < n_bytes < MOST_READ else None
    if groups is None:
        return None, 0
    rows = validation_of(made)
    return smape_interval(row_smape(rows["price"], rows["predicted"]), groups), len(rows)


def say(found: Outcome, event: str, hint: str = "", **facts: object) -> None:
    """Logs the outcome as a line; on a terminal, where `show` follows, the line is only stored with the run.

    Args:
        event: name of the line.
        hint: what can be typed next, at the end of the line; empty: nothing is said.
        facts: further fields of the line.
    """
    line = log.store if _is_terminal() else log.info
    line(event=event, **facts, **found.facts(), **({"hint": hint} if hint else {}))


def show(found: Outcome, config: RunConfig) -> None:
    """Shows the outcome in words, on a terminal; elsewhere does nothing."""
    if not _is_terminal():
        return
    console = tables.console()
    console.print()
    for line, style in _screen(found, config, console.width):
        console.print(tables.text(line, style), soft_wrap=True)


def _is_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty() and not log.is_separate()


INDENT = "  "


def _screen(found: Outcome, config: RunConfig, width: int = tables.WIDEST) -> list[tuple[str, str]]:
    """The lines of the screen, each with its style. Commands that are wider than the terminal go over two lines."""
    took = "" if found.minutes is None else f" in {_duration(found.minutes)}"
    epochs = "1 epoch" if len(found.history) == 1 else f"{len(found.history)} epochs"
    title = f"{found.run.run_id} is trained: {epochs}{took}"
    scores = [(f"{INDENT}{line}", "bold" if not number else "") for number, line in enumerate(_scores(found))]
    where = [(f"{INDENT}{name:8s} {url}", "") for name, url in _places(found.run).items()]
    commands = [(line, "") for command in next_commands(config) for line in _typed(command, width)]
    remarks = [(f"{INDENT}{line}", "yellow" if found.was_improving else "") for line in _remarks(found, config)]
    blank = ("", "")
    return [(title, "bold green"), blank, *scores, *remarks, blank, *where, blank, ("Next:", "bold"), *commands]


def _scores(found: Outcome) -> list[str]:
    """The score, and what it has to beat."""
    rows = f" on {found.rows:,} validation rows" if found.rows else ""
    interval = ""
    if found.interval is not None:
        interval = f" (95% interval {readable(found.interval[0])} - {readable(found.interval[1])})"
    others = [] if found.baselines is None else in_words(found.smape, found.baselines)
    return [f"SMAPE {readable(found.smape)}%{rows}{interval}", *others]


def _remarks(found: Outcome, config: RunConfig) -> list[str]:
    """Which epoch was the best, and whether more of them may help."""
    if not found.history:
        return []
    lowest = min(found.history)
    best = f"Lowest SMAPE {readable(lowest)}% in epoch {1 + found.history.index(lowest)} of {len(found.history)}"
    kept = "" if lowest == found.smape else ", the last weights were kept"
    lines = [f"{best}{kept}"]
    if found.was_improving:
        lines.append(f"It was still improving: more epochs may help, such as --epochs {2 * config.epochs} (a new run)")
    return lines


def _places(run: RunFolder) -> dict[str, str]:
    places = {"run": run.url, "metrics": run.metrics.at(EPOCHS), "report": run.report_url}
    return {name: url for name, url in places.items() if name != "report" or storage.exists(url)}


def next_commands(config: RunConfig) -> list[str]:
    """The commands that use the finished run, ready to paste into a shell."""
    where = shlex.join(["--output", config.output, "--run-id", config.name()])
    names = ("evaluate_by_groups", "predict_test")
    return [as_typed(f"python -m fusion.{config.variant}.{name} {where}") for name in names]


def _typed(command: str, width: int) -> list[str]:
    """The command, over two lines if it is too long for one; a shell reads both as one command."""
    start, flag, rest = command.partition(" --output ")
    if len(INDENT + command) <= width:
        return [INDENT + command]
    return [f"{INDENT}{start} \\", f"{INDENT}   {flag}{rest}"]


def _duration(minutes: float) -> str:
    """Such as "24 s", "7 min" or "3 h 20 min"."""
    if minutes < 2:
        return f"{minutes * 60:.0f} s"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"
