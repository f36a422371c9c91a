"""The head of a report and its first sections: the score beside those of simple methods, and the learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.metrics import compute_metrics, row_smape
from fusion.records.manifests import BASELINES, LINES
from fusion.records.run import FACTS
from fusion.report import charts
from fusion.report.blocks import (
    ABSENT,
    Chart,
    Section,
    Table,
    between,
    count,
    counted,
    dollars,
    number,
    percent,
)
from fusion.report.charts import Dot
from fusion.report.gather import Gathered, Validated

MOST_EPOCHS = 120  # epochs in a table; of longer trainings, every n-th is shown


Reference = tuple[str, Estimate, str]  # other predictions of the same rows: their name, SMAPE, and the file of it
Fact = tuple[str, str, str]  # a figure below the score: its label, value and explanation


@dataclass(frozen=True)
class Headline:
    """The head of a page.

    Attributes:
        smape, interval: as text.
        sentences: what the score means.
        strip: the score beside those of simple predictions.
        facts: label to value, for the row of figures.
        files: where these come from.
    """

    smape: str
    interval: str
    sentences: list[str]
    strip: Chart
    facts: list[Fact]
    files: list[str]


def headline(found: Gathered) -> Headline:
    """The head of the report of a run: the SMAPE beside those of simple predictions."""
    others = references(found)
    gains = [_gain(found.smape.mean, name, one.mean) for name, one, _ in others]
    facts = [
        ("parameters", ABSENT if found.n_parameters is None else count(found.n_parameters), "of the model"),
        ("training time", ABSENT if found.minutes is None else _duration(found.minutes), _attempts(found)),
    ]
    return head(found, "this run", "simple predictions", others, gains, facts)


def head(
    found: Validated, name: str, kind: str, others: Sequence[Reference], gains: Sequence[str], facts: Sequence[Fact]
) -> Headline:
    """The head of a report: the SMAPE beside those of other predictions of the same rows.

    Args:
        name: what the run is called, such as "this run".
        kind: what the others are, such as "simple predictions".
        gains: sentences that compare the SMAPE with the others.
        facts: figures beside those of the rows.
    """
    smape = found.smape
    ours = Dot(name, smape.mean, smape.low, smape.high, percent(smape.mean, 2))
    lines = [ours, *(Dot(other, one.mean, one.low, one.high, percent(one.mean, 2), True) for other, one, _ in others)]
    alt = "SMAPE with 95% interval: " + "; ".join(
        f"{line.label} {percent(line.value, 2)} ({between(line.low, line.high)})" for line in lines
    )
    table = Table(
        f"SMAPE of {name} and of {kind} on the same rows",
        ("prediction", "SMAPE, %", "95% interval", f"{name} is lower by", "from"),
        [
            (name, number(smape.mean), between(smape.low, smape.high, 2), "", found.rows_file),
            *(
                (
                    other,
                    number(one.mean),
                    between(one.low, one.high, 2),
                    f"{number(one.mean - smape.mean)} points",
                    file,
                )
                for other, one, file in others
            ),
        ],
        frozenset({1, 2, 3}),
        frozenset({4}),
    )
    strip = Chart(f"Against {kind}", "SMAPE on the same rows, %; lower is better",
                  charts.dots("strip", alt, lines, "SMAPE, %"), table)  # fmt: skip
    files = [*found.rows_files, *(file for _, _, file in others)]
    return Headline(number(smape.mean), between(smape.low, smape.high), [*_meaning(found), *gains], strip,
                    [*_errors(found.rows), *facts], list(dict.fromkeys(files)))  # fmt: skip


def references(found: Gathered) -> list[Reference]:
    """Simple predictions of the same rows."""
    if found.baselines is not None:
        scores = found.baselines.scores
        return [(one.name, Estimate(one.smape, None, one.low, one.high), BASELINES) for one in scores]
    median, file = _median_price(found)  # an earlier version trained the run
    if median is None:
        return []
    errors = row_smape(found.rows["price"], np.full(len(found.rows), median))
    return [("median price", clustered_mean(errors, found.rows["group"].to_numpy()), file)]


def _median_price(found: Gathered) -> tuple[float | None, str]:
    """The median of the training prices, and the file that has it: the log, else `run.json`, which counts all rows."""
    for event in found.events:
        if event["event"] in ("baseline", "baselines") and "median_price" in event:
            return float(event["median_price"]), event["file"]
    quartiles = found.facts.price_quartiles if found.facts else None
    return (quartiles[1] if quartiles else None), FACTS


def _meaning(found: Validated) -> list[str]:
    """What the score means, in sentences for readers who do not know the metric."""
    rows = found.rows
    ratio = np.abs(rows["predicted"].to_numpy() / rows["price"].to_numpy() - 1)
    within = 100 * float((ratio <= 0.25).mean())
    sentences = [
        f"Half of the predictions are within {percent(100 * float(np.median(ratio)), 0)} of the true price, "
        f"and {percent(within, 0)} of them are within 25%."
    ]
    if found.smape.low is None:
        sentences.append("There are too few groups of near-duplicates for an interval.")
    return sentences


_METHODS = {
    "median price": "predicting the median training price for every product",
    "ridge regression": "a ridge regression on the same embeddings",
}


def _gain(smape: float, name: str, other: float) -> str:
    """How much lower the SMAPE is than that of a simple method."""
    gain, method = other - smape, _METHODS.get(name, name)
    if gain < 0:
        return f"The SMAPE is {number(-gain, 1)} points higher than that of {method} ({percent(other)})."
    return f"The SMAPE is {number(gain, 1)} points lower than that of {method} ({percent(other)})."


def _errors(rows: pd.DataFrame) -> list[Fact]:
    """How many rows there are, and how wrong their predictions are in dollars."""
    errors = (rows["predicted"] - rows["price"]).abs()
    metrics = compute_metrics(rows["price"], rows["predicted"])
    return [
        ("validation rows", count(len(rows)), f"in {counted(rows['group'].nunique(), 'group')} of near-duplicates"),
        ("median error", dollars(float(errors.median())), "half of the prices are off by less"),
        ("mean error", dollars(metrics["mae"]), f"R² {number(metrics['r2'])}, RMSE {dollars(metrics['rmse'])}"),
    ]


def _attempts(found: Gathered) -> str:
    return f"in {counted(len(found.attempts), 'attempt')}"


def _duration(minutes: float) -> str:
    if minutes < 1.5:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def learning(found: Gathered) -> Section | None:
    """The learning curves; None if the history is missing."""
    if not found.history:
        return None
    epochs, smapes = ([float(entry[key]) for entry in found.history] for key in ("epoch", "smape"))
    kept = [entry for entry in found.history if entry["smape"] == found.checkpoint.manifest.smape]
    chosen = float(kept[-1]["epoch"]) if kept else None
    lead, table = _choice(found, chosen, epochs, smapes), _epochs(found)
    plots = [_validation(found, epochs, smapes, chosen, table), _training(found, epochs, table)]
    return Section("learning", "Learning curves", lead, [f"metrics/{LINES}", "config.json"], plots)


def _validation(
    found: Gathered, epochs: Sequence[float], smapes: Sequence[float], chosen: float | None, table: Table
) -> Chart:
    best = int(np.argmin(smapes))
    alt = (
        f"Validation SMAPE goes from {smapes[0]:.1f}% after epoch 1 to {smapes[-1]:.1f}% after epoch {epochs[-1]:.0f}; "
        f"the lowest is {smapes[best]:.1f}% after epoch {epochs[best]:.0f}."
    )
    mark = "" if chosen is None else f"epoch {chosen:.0f}: {number(found.checkpoint.smape)}%"
    svg = charts.curve("validation", alt, epochs, smapes, chosen, mark)
    return Chart("Validation", "SMAPE, %, on rows that no training step has seen", svg, table, charts.beyond(smapes))


def _training(found: Gathered, epochs: Sequence[float], table: Table) -> Chart:
    losses, loss = [float(entry["loss"]) for entry in found.history], found.settings.get("loss", "loss")
    alt = f"Training loss goes from {losses[0]:.3g} in epoch 1 to {losses[-1]:.3g} in epoch {epochs[-1]:.0f}."
    svg = charts.curve("loss", alt, epochs, losses, None)
    return Chart("Training", f"mean loss ({loss}) of the steps of each epoch, with dropout", svg, table,
                 charts.beyond(losses))  # fmt: skip


def _choice(found: Gathered, chosen: float | None, epochs: Sequence[float], smapes: Sequence[float]) -> list[str]:
    """How the epoch was chosen, and whether the score is biased by that."""
    if chosen is None:
        return ["The weights are of the checkpoint that the heading names."]
    if found.settings.get("schedule") == "cosine":
        best = int(np.argmin(smapes))
        passing = f" (The lowest SMAPE in passing was {smapes[best]:.2f}%, after epoch {epochs[best]:.0f}.)"
        return [
            f"The learning rate falls to 0 over the training, and the weights of the last epoch, {chosen:.0f}, are "
            "used. Validation rows choose nothing, so that the score is not biased by a choice."
            + ("" if epochs[best] == chosen else passing)
        ]
    return [
        f"The weights with the lowest validation SMAPE are used: those of epoch {chosen:.0f} of {epochs[-1]:.0f}. "
        "Because the validation rows chose the epoch, the score is a little too good; a test set would say how much."
    ]


def _epochs(found: Gathered) -> Table:
    every = -(-len(found.history) // MOST_EPOCHS)
    shown = found.history[::every]
    caption = "Figures of each epoch" if every == 1 else f"Figures of every {every}th epoch"
    rows = [
        (
            str(entry["epoch"]),
            count(entry.get("step", 0)),
            f"{entry['loss']:.4g}",
            number(entry["smape"], 3),
            f"{entry.get('lr', float('nan')):.3g}",
            number(entry.get("seconds"), 1),
        )
        for entry in shown
    ]
    headings = ("epoch", "steps", "training loss", "validation SMAPE, %", "learning rate", "seconds")
    return Table(caption, headings, rows, frozenset(range(6)))
