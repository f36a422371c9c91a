"""The sections about predicted prices: their errors, and the intervals around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fusion.report import charts
from fusion.report.blocks import (
    Chart,
    Section,
    Table,
    count,
    counted,
    dollars,
    number,
    percent,
    shortened,
)
from fusion.report.charts import Dot
from fusion.report.density import density
from fusion.report.gather import Validated

# Fewest rows in a tenth whose median error is named: with fewer, it is mostly chance.
LEAST_TENTH = 30
# Quantiles of the errors that the table behind the histogram has.
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
MOST_GROUPS = 16  # groups in a chart; more do not fit on a screen. The table has them all


def predictions(found: Validated) -> Section:
    """Predicted against true prices, and the distribution of the errors."""
    price, predicted = (found.rows[name].to_numpy(np.float64) for name in ("price", "predicted"))
    logs = np.log(predicted) - np.log(price)
    too_high, far = (100 * float(wrong.mean()) for wrong in (logs > 0, np.abs(logs) > np.log(2)))
    sides = (
        f"{percent(too_high, 0)} of the prices are predicted too high and {percent(100 - too_high, 0)} too low or "
        f"exactly; {percent(far, 0)} are wrong by more than a factor of 2."
    )
    lead = [sentence for sentence in (sides, _tendency(price, predicted)) if sentence]
    plots = [_against(price, predicted, sides), *_errors(found.rows, logs, sides)]
    return Section("predictions", "Predicted and true prices", lead, [found.rows_file], plots)


def _against(price: np.ndarray, predicted: np.ndarray, sides: str) -> Chart:
    alt = f"Density of {len(price):,} rows: predicted against true price, both logarithmic. {sides}"
    subtitle = "predicted price (up); dashed lines: off by a factor of 2"
    note = "The darker a hexagon, the more rows it has, on a logarithmic scale; on a dark page, the lighter."
    svg = density("density", alt, price, predicted)
    return Chart("Predicted against true price", subtitle, svg, _deciles(price, predicted), note, is_tall=True)


def _errors(rows: pd.DataFrame, logs: np.ndarray, sides: str) -> list[Chart]:
    """Which way the errors go, and how large they are.

    Args:
        logs: log of predicted / true price of each row.
    """
    smape, table = rows["smape"].to_numpy(), _quantiles(rows)
    half, most = (float(np.quantile(smape, share)) for share in (0.5, 0.9))
    alt = f"Half of the rows have a SMAPE of at most {half:.0f}%, 90% of them one of at most {most:.0f}%."
    ways = charts.ratios("ratios", f"Histogram of predicted divided by true price. {sides}", logs)
    return [
        Chart("Which way errors go", "share of rows by predicted / true price", ways, table),
        Chart(
            "How large errors are",
            "share of rows with at most this SMAPE",
            charts.cumulative("cumulative", alt, smape),
            table,
        ),
    ]


def _tendency(price: np.ndarray, predicted: np.ndarray) -> str:
    """Whether cheap products are predicted too high and dear ones too low, as regression to the mean does."""
    order = np.argsort(price, kind="stable")
    tenth = len(order) // 10
    if tenth < LEAST_TENTH:
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


def coverage(found: Validated) -> Section | None:
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
    return Section("intervals", "Price intervals", lead, [found.intervals_file, *found.rows_files], [chart])


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
