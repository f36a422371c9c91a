"""The sections about what the model uses: its sources, neighbours and experts, and the rows that it gets most wrong."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fusion.metrics import row_smape
from fusion.records.manifests import ABLATION
from fusion.records.schemas import Effect, SourceWorth
from fusion.report import charts
from fusion.report.blocks import (
    Chart,
    Command,
    Section,
    Table,
    between,
    dollars,
    listed,
    number,
    percent,
    shortened,
)
from fusion.report.charts import Dot
from fusion.report.gather import Evaluated, Gathered, Validated

N_WORST = 12  # of the 20 rows that an evaluation lists; a reader needs a few to see a pattern
LONGEST_LINE = 100  # characters of a command that fit on a line
LONGEST_TEXT = 400  # characters of a text of a user
LONGEST_COMPARABLE = 90  # characters of the longest text of a comparable product
PREDICTIONS = "metrics/predictions.parquet"


def where_of(found: Validated) -> list[str]:
    """The flags that name this run."""
    if found.run.output and found.run.is_in_runs:
        return ["--output", found.run.output, "--run-id", found.run.run_id]
    return ["--run-dir", found.run.url]


def command(*words: str) -> str:
    """A command for a shell; a long one has a line per flag."""
    line = shlex.join(words)
    if len(line) <= LONGEST_LINE:
        return line
    begins = [number for number, word in enumerate(words) if number and word.startswith("--")]
    parts = [words[begin:end] for begin, end in itertools.pairwise([0, *begins, len(words)])]
    return " \\\n  ".join(shlex.join(part) for part in parts)


def sources(found: Gathered) -> Section:
    """What each source is worth, from the ablation; without one, the command that computes it."""
    record = found.ablation
    if record is None:
        lead = ["What each source of embeddings contributes has not been measured for this run."]
        run = Command("Measure it", command("python", "-m", "fusion.ablation", *where_of(found)))
        return Section("sources", "What each source is worth", lead, [], commands=[run])
    ordered = sorted(record.sources, key=lambda one: -one.shapley.mean)
    first, last = ordered[0], ordered[-1]
    lead = [
        f"Without any source the SMAPE is {percent(record.nothing)}, with all of them {percent(record.everything)}. "
        f"{_named(first)} contributes most to that improvement ({number(first.shapley.mean, 1)} points, averaged over "
        f"all orders of adding sources), {_named(last)} least ({number(last.shapley.mean, 1)}).",
        _dispensable(ordered),
        "A source was hidden from a model that was trained with it. A model that is trained without it may lose less.",
    ]
    shown = [
        _worth_chart("worth", "Share in the improvement", "Shapley value: points of SMAPE that a source takes off",
                     ordered, [one.shapley for one in ordered]),
        _worth_chart("lost", "Loss without it", "points of SMAPE that are lost when only this source is missing",
                     ordered, [one.lost for one in ordered]),
    ]  # fmt: skip
    return Section("sources", "What each source is worth", [text for text in lead if text], [f"metrics/{ABLATION}"],
                   shown, hidden=[_sets(record.sets)])  # fmt: skip


def _named(source: SourceWorth) -> str:
    return f"{source.role} ({source.source})" if source.role != source.source else source.role


def _dispensable(ordered: Sequence[SourceWorth]) -> str:
    """Names the sources without which the model is not significantly worse."""
    names = [one.role for one in ordered if one.lost.low is not None and one.lost.low <= 0]
    return f"Without {listed(names)} alone, the SMAPE is not significantly higher." if names else ""


def _worth_chart(
    name: str, title: str, subtitle: str, ordered: Sequence[SourceWorth], effects: Sequence[Effect]
) -> Chart:
    lines = [
        Dot(one.role, effect.mean, effect.low, effect.high, number(effect.mean))
        for one, effect in zip(ordered, effects, strict=True)
    ]
    table = Table(
        "What each source is worth, in points of SMAPE",
        ("role", "source", "SMAPE with it alone, %", "SMAPE without it, %", "lost without it", "95% interval",
         "Shapley value", "95% interval"),
        [
            (one.role, one.source, number(one.alone), number(one.without), number(one.lost.mean),
             between(one.lost.low, one.lost.high, 2), number(one.shapley.mean),
             between(one.shapley.low, one.shapley.high, 2))
            for one in ordered
        ],
        frozenset(range(2, 8)),
    )  # fmt: skip
    alt = f"{subtitle}: " + "; ".join(f"{line.label} {line.note}" for line in lines)
    return Chart(title, f"{subtitle}, with 95% intervals", charts.dots(name, alt, lines, "points of SMAPE"), table)


def _sets(sets: Mapping[str, float]) -> Table:
    rows = [(name, number(smape)) for name, smape in sorted(sets.items(), key=lambda item: item[1])]
    return Table("SMAPE with each measured set of sources", ("sources", "SMAPE, %"), rows, frozenset({1}))


def use(found: Gathered) -> Section | None:
    """How the model uses its neighbours and its experts; None if it has neither, or was not evaluated."""
    evaluated = found.evaluated
    if evaluated is None:
        return None
    parts = [part for part in (_neighbours(evaluated), _gate(evaluated)) if part is not None]
    if not parts:
        return None
    lead = [sentence for sentence, _, _ in parts]
    return Section("use", "What a prediction is made of", lead, [file for _, file, _ in parts],
                   [chart for _, _, chart in parts])  # fmt: skip


def _neighbours(evaluated: Evaluated) -> tuple[str, str, Chart] | None:
    if "comparable_weights" not in evaluated.rows or evaluated.rows.empty:
        return None
    weights = 100 * np.stack(evaluated.rows["comparable_weights"].to_list()).astype(np.float64)
    listed_, first = weights.sum(axis=1), weights[:, 0]
    n, median, most = weights.shape[1], float(np.median(listed_)), float(np.median(first))
    sentence = (
        f"Each price starts from those of similar training rows, its neighbours. In the median, the {n} that weigh "
        f"most have {percent(median, 0)} of the weight together, and the first {percent(most, 0)}."
    )
    shares = (10, 25, 50, 75, 90)
    table = Table(
        "Weight of the neighbours, quantiles over the rows",
        ("share of rows at or below", "the first, %", f"the first {n} together, %"),
        [(f"{q}%", number(float(np.percentile(first, q)), 1), number(float(np.percentile(listed_, q)), 1))
         for q in shares],
        frozenset({1, 2}),
    )  # fmt: skip
    svg = charts.histogram("neighbours", sentence, listed_, f"weight of the first {n} together, %")
    title = "How much the nearest products decide"
    return sentence, PREDICTIONS, Chart(title, f"share of rows by the weight of their first {n} neighbours", svg, table)


def _gate(evaluated: Evaluated) -> tuple[str, str, Chart] | None:
    gates = evaluated.summary.get("gates") or []
    if not gates:
        return None
    names = [key for key in gates[0] if key != "price_bin"]
    labels = [_bin(str(one["price_bin"])) for one in gates]
    parts = np.array([[float(one[name] or 0) for name in names] for one in gates])
    shown = [name.replace("_", " ") for name in names]
    table = Table(
        "Mean weight of each expert, by true price",
        ("price", *shown),
        [(label, *(percent(100 * part) for part in row)) for label, row in zip(labels, parts, strict=True)],
        frozenset(range(1, len(names) + 1)),
    )
    spread = (parts.max(axis=0) - parts.min(axis=0)) * 100
    most = int(np.argmax(spread))
    sentence = (
        f"The gate mixes {len(names)} experts, with mean weights of "
        f"{listed([percent(100 * part, 0) for part in parts[0]])}. Between price bins, the weight of {shown[most]} "
        f"varies most, by {number(float(spread[most]), 0)} points."
    )
    svg = charts.shares("gate", sentence, labels, parts, shown)
    return sentence, "metrics/summary.json", Chart("The gate", "mean weight of each expert by true price", svg, table)


def _bin(name: str) -> str:
    return f"${name.replace('-', '–')}" if name[:1].isdigit() else name


@dataclass(frozen=True)
class WorstRow:
    """A row with a large error.

    Attributes:
        texts: columns of `train.csv`, name to text.
        comparables: id, price, weight and text of the training rows that weigh most in its price.
    """

    sample_id: str
    price: str
    predicted: str
    smape: str
    factor: str
    interval: str
    texts: list[tuple[str, str]]
    comparables: list[tuple[str, str, str, str]]


def _factor(ratio: float) -> str:
    return f"{number(ratio, 0 if ratio >= 100 else 1)}×"


def _weight(weight: float) -> str:
    return "under 1%" if weight < 0.01 else percent(100 * weight, 0)


@dataclass(frozen=True)
class Worst:
    """The section of the worst rows."""

    lead: list[str]
    rows: list[WorstRow]
    files: list[str]
    commands: list[Command]


def worst(found: Gathered) -> Worst:
    """The rows with the largest SMAPE; with their texts and comparable products if the run was evaluated."""
    rows = found.rows.sort_values(["smape"], ascending=False, kind="stable").head(N_WORST)
    too_high = int((rows["predicted"] > rows["price"]).sum())
    lead = [
        f"Of the {len(rows)} rows with the largest SMAPE, {too_high} are predicted too high and "
        f"{len(rows) - too_high} too low. Such rows are often errors in the data: a wrong price, or a set sold as one."
    ]
    evaluated = found.evaluated
    if evaluated is None or evaluated.as_trained is False:
        run = ["python", "-m", f"fusion.{found.variant}.evaluate_by_groups", *where_of(found)]
        commands = [Command("Show them with their texts and comparable products", command(*run))]
        shown = [_worst_row(str(key), row, {}, None) for key, row in rows.iterrows()]
        return Worst(lead, shown, [found.rows_file], commands if found.config is not None else [])
    described = {str(one["sample_id"]): one for one in evaluated.summary.get("worst", [])}
    shown = [
        _worst_row(str(key), row, described.get(str(key), {}), evaluated.rows.loc[[str(key)]].iloc[0])
        for key, row in rows.iterrows()
        if str(key) in evaluated.rows.index
    ]
    return Worst(lead, shown, ["metrics/summary.json", PREDICTIONS], [])


def _worst_row(key: str, row: pd.Series[Any], described: Mapping[str, Any], full: pd.Series[Any] | None) -> WorstRow:
    """A row for the page.

    Args:
        described: its record in `summary.json`, which has texts; empty if there is none.
        full: its row in `predictions.parquet`; None if it was not evaluated.
    """
    price, predicted = float(row["price"]), float(row["predicted"])
    ratio = predicted / price
    direction = f"{_factor(ratio)} too high" if ratio >= 1 else f"{_factor(1 / ratio)} too low"
    interval, comparables = "", list[tuple[str, str, str, str]]()
    if full is not None and "low_90" in full:
        interval = f"{dollars(float(full['low_90']))} – {dollars(float(full['high_90']))}"
    if full is not None and "comparable_ids" in full:
        comparables = _comparables(full, described.get("comparables") or {})
    texts = described.get("columns") or {}
    shown = [(shortened(name, 40), shortened(str(text), LONGEST_TEXT)) for name, text in texts.items() if text]
    smape = percent(float(row_smape([price], [predicted])[0]), 0)
    return WorstRow(shortened(key, 60), dollars(price), dollars(predicted), smape, direction, interval, shown,
                    comparables)  # fmt: skip


def _comparables(full: pd.Series[Any], texts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    columns = zip(full["comparable_ids"], full["comparable_prices"], full["comparable_weights"], strict=True)
    return [
        (
            shortened(str(one), 40),
            dollars(float(price)),
            _weight(float(weight)),
            shortened(max(map(str, texts.get(str(one), {}).values()), key=len, default=""), LONGEST_COMPARABLE),
        )
        for one, price, weight in columns
    ]
