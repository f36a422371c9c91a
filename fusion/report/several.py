"""The sections of a page that compares runs. `fusion.compare` does the statistics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
import pandas as pd

from fusion import storage
from fusion.compare.comparison import MIN_SHARED, Apart, Comparison, Entry, compare
from fusion.compare.out_of_fold import Scored, Shared, shared
from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.metrics import FloatArray, row_smape
from fusion.records.manifests import LINES
from fusion.records.price_bins import price_bins
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
    listed,
    number,
    percent,
    shortened,
)
from fusion.report.charts import Dot
from fusion.report.groups import LEAST_NAMED, dollar_bin

MOST_GROUPS = 12  # groups in the chart and table of differences
MOST_CURVES = 6  # curves in a chart, which has as many styles of lines
FILES = ("config.json", "checkpoints/*/validation.parquet", "split.parquet")


@dataclass(frozen=True)
class Several:
    """Runs that are compared.

    Attributes:
        entries: those that validated on the same rows, the best first; run number i has the letter `letter(i)`.
        scored: the same runs, in the order of `entries`.
        rows: the shared validation rows.
        errors: [n runs, n rows] SMAPE in %.
    """

    found: Comparison
    scored: list[Scored]
    rows: Shared
    errors: FloatArray

    @property
    def entries(self) -> list[Entry]:
        return self.found.runs


def several(runs: Sequence[Scored]) -> Several:
    """Compares runs, see `fusion.compare.comparison.compare`."""
    found = compare(runs)
    by_name = {one.name: one for one in runs}
    together = [by_name[entry.name] for entry in found.runs]
    rows = shared(together)
    errors = np.stack([row_smape(rows.prices, predicted) for predicted in rows.predicted])
    return Several(found, together, rows, errors)


def letter(number_: int) -> str:
    return ascii_uppercase[number_] if number_ < len(ascii_uppercase) else str(number_ + 1)


def sections(one: Several) -> list[Section]:
    found = [_scores(one), _settings(one), _curves(one), _groups(one), _apart(one)]
    return [section for section in found if section is not None]


def title(one: Several) -> str:
    names = [shortened(entry.name, 60) for entry in one.entries]
    return listed(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} other runs"


def _scores(one: Several) -> Section:
    entries, rows = one.entries, one.found
    lead = [
        f"{counted(rows.rows, 'row')} that all of these runs validated on, in {counted(rows.groups, 'group')} of "
        "near-duplicates. Differences are paired: each row is predicted by both runs. Intervals count groups, not "
        "rows, as independent.",
        *_verdict(entries),
    ]
    scores = [
        Dot(_labelled(i, entry), one_.mean, one_.low, one_.high, percent(one_.mean, 2))
        for i, (entry, one_) in enumerate((entry, entry.smape) for entry in entries)
    ]
    gaps = [
        Dot(_labelled(i, entry), gap.mean, gap.low, gap.high, f"{number(gap.mean)}", not gap.is_significant)
        for i, entry in enumerate(entries)
        if (gap := entry.to_best) is not None
    ]
    table = _scores_table(one)
    alt = "SMAPE: " + "; ".join(f"{dot.label} {dot.note}" for dot in scores)
    svg = charts.dots("scores", alt, scores, "SMAPE, %", from_zero=False)
    plots = [Chart("SMAPE", "on the shared rows, %, with 95% intervals", svg, table)]
    if gaps:
        alt = f"SMAPE minus that of {entries[0].name}: " + "; ".join(f"{dot.label} {dot.note}" for dot in gaps)
        svg = charts.dots("gaps", alt, gaps, "points of SMAPE", reference=0.0, marked="A")
        note = "Hollow: less than twice its standard error, so it may be chance."
        plots.append(
            Chart("Difference to the best run", "paired, points of SMAPE, with 95% intervals", svg, table, note)
        )
    return Section("scores", "Scores", lead, FILES, plots, [table])


def _labelled(number_: int, entry: Entry) -> str:
    return f"{letter(number_)} {entry.name}"


def _verdict(entries: Sequence[Entry]) -> list[str]:
    undecided = [entry.name for entry in entries if entry.to_best is not None and not entry.to_best.is_significant]
    if undecided:
        return [f"{entries[0].name} is the best, but not significantly better than {listed(undecided)}."]
    if len(entries) > 1:
        return [f"{entries[0].name} is significantly better than every other run."]
    return []


def _scores_table(one: Several) -> Table:
    headings = ("letter", "run", "SMAPE, %", "95% interval", "to A", "95% interval", "median error", "mean error",
                "within 25%", "parameters", "minutes")  # fmt: skip
    rows = [_score_row(one, i, entry) for i, entry in enumerate(one.entries)]
    return Table("Metrics side by side", headings, rows, frozenset(range(2, len(headings))))


def _score_row(one: Several, i: int, entry: Entry) -> tuple[str, ...]:
    prices, predicted, gap = one.rows.prices, one.rows.predicted[i], entry.to_best
    off = np.abs(predicted - prices)
    name = shortened(entry.name, 60) + ("" if entry.finished else " (unfinished)")
    return (
        letter(i),
        name,
        number(entry.smape.mean),
        between(entry.smape.low, entry.smape.high),
        ABSENT if gap is None else number(gap.mean),
        ABSENT if gap is None else between(gap.low, gap.high, 2),
        dollars(float(np.median(off))),
        dollars(float(off.mean())),
        percent(100 * float((off <= 0.25 * prices).mean()), 0),
        ABSENT if entry.parameters is None else count(entry.parameters),
        number(entry.minutes, 1),
    )


def _settings(one: Several) -> Section:
    n_runs = len(one.entries) + len(one.found.apart)
    differ = one.found.settings
    if not differ:
        return Section("settings", "Settings that differ", ["No setting that decides the result differs."], FILES[:1])
    names = [entry.name for entry in one.entries] + [apart.name for apart in one.found.apart]
    rows = [(key, *(_cell(value) for value in values)) for key, values in differ.items()]
    headings = ("setting", *(f"{letter(i)} {shortened(names[i], 30)}" for i in range(n_runs)))
    table = Table("Their values in each run", headings, rows, code=frozenset(range(n_runs + 1)))
    return Section("settings", "Settings that differ", [], FILES[:1], tables=[table])


def _cell(value: Any) -> str:
    if value is None or value == []:
        return ABSENT
    return shortened(" ".join(map(str, value)) if isinstance(value, list) else str(value), 80)


def _curves(one: Several) -> Section | None:
    """The learning curves of the runs; of fold runs, those of the first fold."""
    known = list[tuple[str, list[float], list[float], list[float]]]()
    for i, scored in enumerate(one.scored[:MOST_CURVES]):
        history = _history(scored)
        epochs, smapes, losses = ([float(entry[key]) for entry in history] for key in ("epoch", "smape", "loss"))
        if history:
            known.append((letter(i), epochs, smapes, losses))
    if not known:
        return None
    ends = "; ".join(f"{name} ends at {smapes[-1]:.2f}%" for name, _, smapes, _ in known)
    table = Table(
        "The last epoch of each run",
        ("run", "epochs", "validation SMAPE, %", "lowest SMAPE, %", "training loss"),
        [(name, count(len(epochs)), number(smapes[-1]), number(min(smapes)), f"{losses[-1]:.4g}")
         for name, epochs, smapes, losses in known],
        frozenset({1, 2, 3, 4}),
    )  # fmt: skip
    plots = [
        Chart("Validation", "SMAPE, %, on each run's own validation rows",
              charts.overlaid("validation", f"Validation SMAPE by epoch: {ends}.", [run[:3] for run in known]), table),
        Chart("Training", "mean loss of each epoch; comparable only for the same loss",
              charts.overlaid("loss", "Training loss by epoch.", [(run[0], run[1], run[3]) for run in known]), table),
    ]  # fmt: skip
    left_out = len(one.scored) - MOST_CURVES
    lead = [f"The curves of the {MOST_CURVES} best runs are shown."] if left_out > 0 else []
    return Section("curves", "Learning curves", lead, [f"metrics/{LINES}"], plots)


def _history(scored: Scored) -> list[dict[str, Any]]:
    content = storage.read_if_exists(scored.members[0].run.at("metrics", LINES)) or b""
    try:
        return [json.loads(line) for line in content.splitlines()]
    except ValueError:
        return []


@dataclass(frozen=True)
class _Group:
    by: str
    name: str
    rows: int
    smapes: list[float]
    gap: Estimate  # of the second run to the best one

    @property
    def range(self) -> float:
        return max(self.smapes) - min(self.smapes)


def _groups(one: Several) -> Section | None:
    """The groups in which the runs differ most."""
    if len(one.entries) < 2:
        return None
    labels = [("price", price_bins(pd.Series(one.rows.prices)).map(dollar_bin).to_numpy())]
    if one.rows.category is not None:
        labels.append(("category", one.rows.category.astype("str").to_numpy()))
    every = [group for by, values in labels for group in _groups_of(one, by, values)]
    shown = sorted(every, key=lambda group: -group.range)[:MOST_GROUPS]
    if not shown:
        return None
    first, second = one.entries[0].name, one.entries[1].name
    table = Table(
        "SMAPE of each run by group, in %",
        ("group", "by", "rows", *map(letter, range(len(one.entries))), "B − A", "95% interval"),
        [_group_row(group) for group in shown],
        frozenset(range(2, 5 + len(one.entries))),
    )  # fmt: skip
    dots = [Dot(group.name or "(missing)", group.gap.mean, group.gap.low, group.gap.high, counted(group.rows, "row"),
                not group.gap.is_significant) for group in shown]  # fmt: skip
    alt = f"SMAPE of {second} minus that of {first}: " + "; ".join(f"{dot.label} {number(dot.value)}" for dot in dots)
    svg = charts.dots("groups", alt, dots, "points of SMAPE", reference=0.0, marked="equal")
    subtitle = f"SMAPE of B minus A; right of 0: A ({shortened(first, 40)}) is better"
    chart = Chart("B against A, by group", subtitle, svg, table, "Hollow: may be chance.")
    lead = [f"The {len(shown)} groups of at least {LEAST_NAMED} rows, by price and category, in which the runs' SMAPEs "
            "are farthest apart. With so many groups, one in twenty differs by chance alone."]  # fmt: skip
    return Section("groups", "Where they differ most", lead, FILES[1:], [chart], [table])


def _group_row(group: _Group) -> tuple[str, ...]:
    head = (shortened(group.name or "(missing)", 60), group.by, count(group.rows))
    return (*head, *map(number, group.smapes), number(group.gap.mean), between(group.gap.low, group.gap.high, 2))


def _groups_of(one: Several, by: str, labels: np.ndarray) -> list[_Group]:
    found = []
    for name in pd.unique(labels):
        chosen = labels == name
        if chosen.sum() < LEAST_NAMED:
            continue
        errors = one.errors[:, chosen]
        gap = clustered_mean(errors[1] - errors[0], one.rows.groups[chosen])
        found.append(_Group(by, str(name), int(chosen.sum()), [float(smape) for smape in errors.mean(axis=1)], gap))
    return found


def _apart(one: Several) -> Section | None:
    if not one.found.apart:
        return None
    lead = [
        f"These runs validated on other rows. They are compared with {one.entries[0].name} on the rows that both "
        f"validated on, if there are at least {MIN_SHARED}."
    ]
    headings = ("letter", "run", "rows", "shared", "SMAPE there, %", "A there, %", "to A", "95% interval")
    rows = [_apart_row(len(one.entries) + i, apart) for i, apart in enumerate(one.found.apart)]
    table = Table("Runs that validated on other rows", headings, rows, frozenset(range(2, len(headings))))
    return Section("apart", "Listed apart", lead, FILES[1:], tables=[table])


def _apart_row(number_: int, apart: Apart) -> tuple[str, ...]:
    gap = apart.to_best
    return (
        letter(number_),
        shortened(apart.name, 60),
        count(apart.rows),
        count(apart.shared),
        number(apart.smape),
        number(apart.best_smape),
        ABSENT if gap is None else number(gap.mean),
        ABSENT if gap is None else between(gap.low, gap.high, 2),
    )
