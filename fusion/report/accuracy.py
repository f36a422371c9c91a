"""The sections about accuracy: the score, its learning curve, the predictions, the groups and the intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.metrics import compute_metrics, row_smape
from fusion.records.intervals import CATEGORY
from fusion.records.manifests import BASELINES, INTERVALS, LINES, SPLIT, VALIDATION
from fusion.records.price_bins import BIN_NAMES, OUTSIDE, price_bins
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
    shortened,
)
from fusion.report.charts import Dot
from fusion.report.gather import Gathered

# Fewest rows of a group that is named as the worst. The SMAPE of a row is about 40 with as large a deviation, so the
# mean over 30 rows has a standard error of about 7; of smaller groups, the worst is mostly the unluckiest.
LEAST_NAMED = 30
LEAST_SHOWN = 10  # rows of a group in a chart: the interval of a smaller one would be wider than the chart
MOST_LISTED = 100  # groups in a table, the largest; nobody reads more, and the page stays small
MOST_COLUMNS = 8  # tables of columns that the evaluation grouped by
MOST_GROUPS = 16  # groups in a chart; more do not fit on a screen. The table has them all
MOST_EPOCHS = 120  # epochs in a table; of longer trainings, every n-th is shown
MISSING = "(missing)"
# Quantiles of the errors that the table behind the histogram has.
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


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
    facts: list[tuple[str, str, str]]
    files: list[str]


def headline(found: Gathered) -> Headline:
    rows, smape = found.rows, found.smape
    others = references(found)
    ours = Dot("this run", smape.mean, smape.low, smape.high, percent(smape.mean, 2))
    lines = [ours, *(Dot(name, one.mean, one.low, one.high, percent(one.mean, 2), True) for name, one, _ in others)]
    alt = "SMAPE with 95% interval: " + "; ".join(
        f"{line.label} {percent(line.value, 2)} ({between(line.low, line.high)})" for line in lines
    )
    table = Table(
        "SMAPE of this run and of simple predictions on the same rows",
        ("prediction", "SMAPE, %", "95% interval", "this run is lower by", "from"),
        [
            ("this run", number(smape.mean), between(smape.low, smape.high, 2), "", _predictions_file(found)),
            *(
                (name, number(one.mean), between(one.low, one.high, 2), f"{number(one.mean - smape.mean)} points", file)
                for name, one, file in others
            ),
        ],
        frozenset({1, 2, 3}),
        frozenset({4}),
    )
    strip = Chart("Against simple predictions", "SMAPE on the same rows, %; lower is better",
                  charts.dots("strip", alt, lines, "SMAPE, %"), table)  # fmt: skip
    files = [_predictions_file(found), SPLIT, *dict.fromkeys(file for _, _, file in others)]
    facts = _facts(found)
    return Headline(number(smape.mean), between(smape.low, smape.high), _meaning(rows, smape, others), strip, facts,
                    list(dict.fromkeys(files)))  # fmt: skip


def references(found: Gathered) -> list[tuple[str, Estimate, str]]:
    """Simple predictions of the same rows: name, SMAPE, and the file that it is from."""
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


def _predictions_file(found: Gathered) -> str:
    if found.checkpoint.manifest.sha256_of(VALIDATION):
        return f"checkpoints/{found.checkpoint.name}/{VALIDATION}"
    return "metrics/predictions.parquet"


def _meaning(rows: pd.DataFrame, smape: Estimate, others: Sequence[tuple[str, Estimate, str]]) -> list[str]:
    """What the score means, in sentences for readers who do not know the metric."""
    ratio = np.abs(rows["predicted"].to_numpy() / rows["price"].to_numpy() - 1)
    within = 100 * float((ratio <= 0.25).mean())
    found = [
        f"Half of the predictions are within {percent(100 * float(np.median(ratio)), 0)} of the true price, "
        f"and {percent(within, 0)} of them are within 25%."
    ]
    found += [_gain(smape.mean, name, one.mean) for name, one, _ in others]
    if smape.low is None:
        found.append("There are too few groups of near-duplicates for an interval.")
    return found


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


def _facts(found: Gathered) -> list[tuple[str, str, str]]:
    """Label, value and explanation of the figures below the score."""
    rows = found.rows
    errors = (rows["predicted"] - rows["price"]).abs()
    metrics = compute_metrics(rows["price"], rows["predicted"])
    return [
        ("validation rows", count(len(rows)), f"in {counted(rows['group'].nunique(), 'group')} of near-duplicates"),
        ("median error", dollars(float(errors.median())), "half of the prices are off by less"),
        ("mean error", dollars(metrics["mae"]), f"R² {number(metrics['r2'])}, RMSE {dollars(metrics['rmse'])}"),
        ("parameters", ABSENT if found.n_parameters is None else count(found.n_parameters), "of the model"),
        ("training time", ABSENT if found.minutes is None else _duration(found.minutes), _attempts(found)),
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
    epochs = [float(entry["epoch"]) for entry in found.history]
    smapes, losses = ([float(entry[key]) for entry in found.history] for key in ("smape", "loss"))
    kept = [entry for entry in found.history if entry["smape"] == found.checkpoint.manifest.smape]
    chosen = float(kept[-1]["epoch"]) if kept else None
    loss = str(found.settings.get("loss", "loss"))
    table = _epochs(found)
    best = int(np.argmin(smapes))
    alts = (
        f"Validation SMAPE falls from {smapes[0]:.1f}% after epoch 1 to {smapes[-1]:.1f}% after epoch "
        f"{epochs[-1]:.0f}; the lowest is {smapes[best]:.1f}% after epoch {epochs[best]:.0f}.",
        f"Training loss goes from {losses[0]:.3g} in epoch 1 to {losses[-1]:.3g} in epoch {epochs[-1]:.0f}.",
    )
    notes = [charts.beyond(values) for values in (smapes, losses)]
    mark = "" if chosen is None else f"epoch {chosen:.0f}: {number(found.checkpoint.smape)}%"
    return Section(
        "learning",
        "Learning curves",
        _choice(found, chosen, epochs, smapes),
        [f"metrics/{LINES}", "config.json"],
        [
            Chart(
                "Validation",
                "SMAPE, %, on rows that no training step has seen",
                charts.curve("validation", alts[0], epochs, smapes, chosen, mark),
                table,
                notes[0],
            ),
            Chart(
                "Training",
                f"mean loss ({loss}) of the steps of each epoch, with dropout",
                charts.curve("loss", alts[1], epochs, losses, None),
                table,
                notes[1],
            ),
        ],
    )


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


def predictions(found: Gathered) -> Section:
    """Predicted against true prices, and the distribution of the errors."""
    price, predicted = (found.rows[name].to_numpy(np.float64) for name in ("price", "predicted"))
    logs = np.log(predicted) - np.log(price)
    too_high = 100 * float((logs > 0).mean())
    far = 100 * float((np.abs(logs) > np.log(2)).mean())
    lead = [
        f"{percent(too_high, 0)} of the prices are predicted too high and {percent(100 - too_high, 0)} too low or "
        f"exactly; {percent(far, 0)} are wrong by more than a factor of 2.",
        _tendency(price, predicted),
    ]
    alts = (
        f"Density of {len(price):,} rows: predicted against true price, both logarithmic. {lead[0]}",
        f"Histogram of predicted divided by true price. {lead[0]}",
        f"Half of the rows have a SMAPE of at most {np.median(found.rows['smape']):.0f}%, 90% of them one of at most "
        f"{np.quantile(found.rows['smape'], 0.9):.0f}%.",
    )
    by_decile, quantiles = _deciles(price, predicted), _quantiles(found.rows)
    return Section(
        "predictions",
        "Predicted and true prices",
        [sentence for sentence in lead if sentence],
        [_predictions_file(found)],
        [
            Chart(
                "Predicted against true price",
                "predicted price (up); dashed lines: off by a factor of 2",
                charts.density("density", alts[0], price, predicted),
                by_decile,
                note="Darker hexagons have more rows, on a logarithmic scale.",
                is_tall=True,
            ),
            Chart(
                "Which way errors go",
                "share of rows by predicted / true price",
                charts.ratios("ratios", alts[1], logs),
                quantiles,
            ),
            Chart(
                "How large errors are",
                "share of rows with at most this SMAPE",
                charts.cumulative("cumulative", alts[2], found.rows["smape"].to_numpy()),
                quantiles,
            ),
        ],
    )


def _tendency(price: np.ndarray, predicted: np.ndarray) -> str:
    """Whether cheap products are predicted too high and dear ones too low, as regression to the mean does."""
    order = np.argsort(price, kind="stable")
    tenth = len(order) // 10
    if tenth < LEAST_NAMED:
        return ""
    ratios = predicted / price
    cheap, dear = (float(np.median(ratios[part])) for part in (order[:tenth], order[-tenth:]))
    return (
        f"The cheapest tenth is predicted at {number(cheap)} times its price in the median, the dearest tenth at "
        f"{number(dear)} times."
    )


def _deciles(price: np.ndarray, predicted: np.ndarray) -> Table:
    """Median predicted price and error by tenth of the true price."""
    rows = []
    for part in np.array_split(np.argsort(price, kind="stable"), min(10, len(price))):
        ratio = np.median(predicted[part] / price[part])
        cells = (f"{dollars(price[part].min())} to {dollars(price[part].max())}", count(len(part)))
        medians = (dollars(float(np.median(price[part]))), dollars(float(np.median(predicted[part]))))
        rows.append((*cells, *medians, f"{number(float(ratio))}×"))
    headings = ("true price", "rows", "median true", "median predicted", "median predicted / true")
    return Table("Tenths of the rows by true price", headings, rows, frozenset({1, 2, 3, 4}))


def _quantiles(rows: pd.DataFrame) -> Table:
    table = [
        (
            f"{100 * share:g}%",
            number(float(np.quantile(rows["smape"], share)), 1),
            dollars(float(np.quantile(np.abs(rows["predicted"] - rows["price"]), share))),
            f"{number(float(np.quantile(rows['predicted'] / rows['price'], share)))}×",
        )
        for share in QUANTILES
    ]
    headings = ("share of rows at or below", "SMAPE, %", "absolute error", "predicted / true")
    return Table("Quantiles of the errors", headings, table, frozenset({1, 2, 3}))


@dataclass(frozen=True)
class Group:
    name: str
    rows: int
    smape: Estimate
    ratio: float  # median of predicted / true price


def groups_of(rows: pd.DataFrame, labels: pd.Series) -> list[Group]:
    """The SMAPE of each of the `MOST_LISTED` largest groups, with an interval from groups of near-duplicates."""
    names = labels.to_numpy()
    largest = set(pd.Series(names).value_counts().index[:MOST_LISTED])
    columns = rows[["price", "predicted", "smape", "group"]]
    return [_group(str(name), part) for name, part in columns.groupby(names, sort=False) if name in largest]


def _group(name: str, part: pd.DataFrame) -> Group:
    smape = clustered_mean(part["smape"].to_numpy(), part["group"].to_numpy())
    return Group(name, len(part), smape, float((part["predicted"] / part["price"]).median()))


def by_group(found: Gathered) -> Section:
    """SMAPE by price bin, by category and by the columns that the evaluation grouped by."""
    prices = groups_of(found.rows, price_bins(found.rows["price"]))
    prices.sort(key=lambda group: [*BIN_NAMES, OUTSIDE].index(group.name))
    named = [Group(_dollar_bin(group.name), group.rows, group.smape, group.ratio) for group in prices]
    every = [("price", "true price, dollars", named)]
    if "category" in found.rows and found.rows["category"].nunique() > 1:
        column = _category_column(found)
        labels = found.rows["category"].astype("str").where(lambda text: text != "", MISSING)
        of_category = sorted(groups_of(found.rows, labels), key=lambda group: -group.rows)
        every.append((column, f"column {column}", of_category))
    lead = [_worst(which, groups, found.smape.mean) for which, _, groups in every]
    plots = [_groups_chart(f"groups-{i}", which, what, groups, found) for i, (which, what, groups) in enumerate(every)]
    files = [_predictions_file(found), SPLIT]
    return Section("groups", "Where it is right and wrong", [text for text in lead if text], files, plots,
                   hidden=_evaluated_groups(found))  # fmt: skip


def _category_column(found: Gathered) -> str:
    """Name of the column of `train.csv` that "category" of the rows was read from."""
    return found.intervals.by if found.intervals and found.intervals.by else CATEGORY


def _dollar_bin(name: str) -> str:
    return f"${name.replace('-', '–')}" if name != OUTSIDE else name


def _worst(which: str, groups: Sequence[Group], overall: float) -> str:
    large = [group for group in groups if group.rows >= LEAST_NAMED]
    if not large:
        return f"No group by {which} has {LEAST_NAMED} rows or more, so none is named as the worst."
    worst, best = (choose(large, key=lambda group: group.smape.mean) for choose in (max, min))
    if len(large) == 1:
        return f"By {which}, only {shortened(worst.name, 40)} has {LEAST_NAMED} rows or more."
    times = worst.smape.mean / overall if overall else float("nan")
    among = f"of the {MOST_LISTED} largest groups" if len(groups) == MOST_LISTED else "group"
    return (
        f"By {which}, the worst {among} of at least {LEAST_NAMED} rows is {shortened(worst.name, 40)}, with a SMAPE of "
        f"{percent(worst.smape.mean)} ({between(*_possible(worst.smape))}), {number(times, 1)} times that of "
        f"all rows; the best is {shortened(best.name, 40)}, with {percent(best.smape.mean)}."
    )


def _groups_chart(name: str, which: str, what: str, groups: Sequence[Group], found: Gathered) -> Chart:
    large = [group for group in groups if group.rows >= LEAST_SHOWN]
    shown = (large or list(groups))[:MOST_GROUPS]
    lines = [Dot(g.name, g.smape.mean, *_possible(g.smape), counted(g.rows, "row")) for g in shown]
    left = len(groups) - len(shown)
    note = f"{len(shown)} of {len(groups)} groups; the table has the others, which are smaller." if left else ""
    alt = f"SMAPE by {what}: " + "; ".join(f"{line.label} {percent(line.value)}" for line in lines)
    table = Table(
        f"SMAPE by {what}",
        (which, "rows", "SMAPE, %", "95% interval", "median predicted / true"),
        [
            (shortened(g.name, 80), count(g.rows), number(g.smape.mean), between(*_possible(g.smape)),
             f"{number(g.ratio)}×")
            for g in groups
        ],
        frozenset({1, 2, 3, 4}),
    )  # fmt: skip
    overall = found.smape.mean
    svg = charts.dots(name, alt, lines, "SMAPE, %", reference=overall, marked=f"all rows: {number(overall, 1)}%")
    return Chart(f"By {which}", f"SMAPE by {what}, with 95% intervals", svg, table, note)


def _possible(smape: Estimate) -> tuple[float | None, float | None]:
    """The interval of a SMAPE, without the values below 0% and above 200% that no SMAPE can have."""
    if smape.low is None or smape.high is None:
        return None, None
    return max(0.0, smape.low), min(200.0, smape.high)


def _evaluated_groups(found: Gathered) -> list[Table]:
    """Groups that only the evaluation knows: which sources a row has, and columns of the user."""
    if found.evaluated is None:
        return []
    groups, shown = found.evaluated.groups, {"overall", "price_bin", "price_range", _category_column(found)}
    others = [name for name in dict.fromkeys(groups["by"]) if name not in shown]
    tables = ((str(name), groups[groups["by"] == name].head(MOST_LISTED)) for name in others[:MOST_COLUMNS])
    return [_evaluated_table(name, rows) for name, rows in tables]


def _evaluated_table(name: str, groups: pd.DataFrame) -> Table:
    rows = [
        (shortened(str(one["group"]), 80), count(one["count"]), number(one["smape"]),
         between(one["smape_low"], one["smape_high"]), dollars(one["mae"]), dollars(one["bias"]))
        for _, one in groups.iterrows()
    ]  # fmt: skip
    what = "which sources a row has" if name == "present" else f"column {shortened(name, 40)}"
    headings = (shortened(name, 40), "rows", "SMAPE, %", "95% interval", "mean error", "bias")
    return Table(f"By {what}, from metrics/groups.parquet", headings, rows, frozenset({1, 2, 3, 4, 5}))


def coverage(found: Gathered) -> Section | None:
    """How often the price intervals contain the price; None if the run has none."""
    table = found.coverage
    if found.intervals is None or table.empty:
        return None
    overall = table.iloc[0]
    low, high = (overall[f"covered_{level}"] for level in (80, 95))
    lead = [
        f"Of 90% intervals, {percent(100 * overall['covered_90'])} contain the true price (80%: {percent(100 * low)}; "
        f"95%: {percent(100 * high)}). In the median, a 90% interval reaches from the predicted price divided by "
        f"{number(overall['factor_90'])} to the price times {number(overall['factor_90'])}.",
        "The intervals were fitted to these validation rows. So each row is judged by intervals that were fitted "
        "without it and its near-duplicates.",
    ]
    lines = [_coverage_dot(one) for _, one in table.head(MOST_GROUPS).iterrows()]
    alt = "Coverage of 90% intervals: " + "; ".join(f"{line.label} {percent(line.value)}" for line in lines)
    svg = charts.dots("coverage", alt, lines, "prices within their 90% interval, %", reference=90.0, marked="90%",
                      from_zero=False)  # fmt: skip
    chart = Chart("Coverage of the 90% intervals", "share of true prices within; bars: ±1.96 standard errors", svg,
                  _coverage_table(table))  # fmt: skip
    where = f"checkpoints/{found.checkpoint.name}/{INTERVALS}"
    return Section("intervals", "Price intervals", lead, [where, _predictions_file(found), SPLIT], [chart])


def _coverage_dot(one: pd.Series[Any]) -> Dot:
    share, half = 100 * one["covered_90"], 196 * one["error"]
    label = shortened(_covered(one["group"]), 60)
    return Dot(label, share, max(0.0, share - half), min(100.0, share + half), counted(int(one["count"]), "row"))


def _covered(group: object) -> str:
    return str(group) or "(other categories)"


def _coverage_table(table: pd.DataFrame) -> Table:
    levels = [str(name) for name in table if str(name).startswith("covered_")]
    rows = [
        (shortened(_covered(one["group"]), 80), str(one["by"]), count(one["count"]),
         *(percent(100 * one[level]) for level in levels), f"{number(one['factor_90'])}×")
        for _, one in table.iterrows()
    ]  # fmt: skip
    named = [f"within {level.removeprefix('covered_')}%" for level in levels]
    headings = ("group", "by", "rows", *named, "median factor of 90%")
    return Table("Share of prices within their intervals", headings, rows, frozenset(range(2, len(headings))))
