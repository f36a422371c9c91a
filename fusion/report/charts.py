"""The charts of the reports. Each function returns an `<svg>` element as text that is safe to embed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from fusion.report.drawing import COLOURS, Canvas, canvas, cut, width_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RULE, ACCENT, SECOND, SOFT, PAPER = (
    COLOURS[name] for name in ("ink", "muted", "rule", "accent", "second", "soft", "paper")
)
MANY_EPOCHS = 8  # of a curve in which the first epoch may be left out; fewer show only its fall
ROW = 25.0  # height of a line of a dot plot
BARS = 41  # of a histogram: odd, so that a bar is centred on "exact"
# Prices that are wrong by more than this factor are in the outermost bars of the histogram.
LARGEST_FACTOR = 8


@dataclass(frozen=True)
class Dot:
    """A line of a dot plot.

    Attributes:
        low, high: the interval that is drawn through the dot; None for none.
        note: text at the right, such as a number of rows.
        is_second: whether the dot has the second colour and a hollow shape.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    is_second: bool = False


def curve(
    name: str, alt: str, epochs: Sequence[float], values: Sequence[float], chosen: float | None, others: str = ""
) -> Markup:
    """A quantity by epoch; the chosen epoch is marked with a ring and its value."""
    with canvas(230, left=40, right=20, top=18) as drawn:
        axes = drawn.axes
        axes.grid(axis="y")
        marker = "o" if len(epochs) < 40 else ""
        axes.plot(epochs, values, color=ACCENT, linewidth=1.75, marker=marker, markersize=3.5)
        _whole_epochs(axes, epochs)
        axes.set_ylim(*_room(values))
        axes.set_xlabel("epoch", loc="right", labelpad=3)
        if chosen is not None and chosen in epochs:
            _mark(axes, chosen, values[list(epochs).index(chosen)], len(epochs), others)
        return drawn.svg(name, alt)


def _whole_epochs(axes: Axes, epochs: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(min(epochs) - 0.02 * len(epochs), max(epochs) + 0.02 * len(epochs))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _room(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis for these values, with some room."""
    low, high = min(values), max(values)
    if len(values) >= MANY_EPOCHS:
        # The first epoch is often so far above the others that it would flatten their curve. Then it is left out.
        later = values[1:]
        high = min(high, max(later) + 0.25 * (max(later) - low))
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def beyond(values: Sequence[float]) -> str:
    """Says which values `curve` leaves out at the top; empty if it shows all."""
    high = _room(values)[1]
    above = [number + 1 for number, value in enumerate(values) if value > high]
    if not above:
        return ""
    return f"Above the axis: {max(values[n - 1] for n in above):.4g}, epoch {', '.join(map(str, above[:5]))}."


def _mark(axes: Axes, epoch: float, value: float, n_epochs: int, text: str) -> None:
    axes.plot([epoch], [value], "o", markersize=9, markerfacecolor="none", markeredgecolor=SECOND, markeredgewidth=2)
    is_right = epoch > n_epochs / 2
    axes.annotate(
        text or f"{value:.2f}",
        (epoch, value),
        xytext=(-9 if is_right else 9, 12),
        textcoords="offset points",
        ha="right" if is_right else "left",
        color=SECOND,
        weight="bold",
    )


def ratios(name: str, alt: str, log_ratios: np.ndarray) -> Markup:
    """Histogram of predicted / true price on a logarithmic axis; the outermost bars have all that is farther off."""
    edge = math.log2(LARGEST_FACTOR)
    edges = np.linspace(-edge, edge, BARS + 1)
    shares = 100 * np.histogram(np.clip(log_ratios / math.log(2), -edge, edge), edges)[0] / len(log_ratios)
    with canvas(230, left=34, right=14, top=14, bottom=38) as drawn:
        axes = drawn.axes
        axes.grid(axis="y")
        axes.bar(edges[:-1], shares, width=np.diff(edges) * 0.88, align="edge", color=ACCENT, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1)
        factors = (-3, -2, -1, 0, 1, 2, 3)
        axes.set_xticks(factors, labels=["≤ ⅛×", "¼×", "½×", "exact", "2×", "4×", "≥ 8×"])
        axes.set_xlabel("predicted / true price", loc="right", labelpad=3)
        _percent(axes)
        return drawn.svg(name, alt)


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))


def cumulative(name: str, alt: str, smape: np.ndarray) -> Markup:
    """Share of the rows whose SMAPE is at most x."""
    levels = np.linspace(0, 200, 101)
    shares = 100 * np.searchsorted(np.sort(smape), levels, side="right") / len(smape)
    median = float(np.median(smape))
    with canvas(230, left=40, right=18, top=14, bottom=38) as drawn:
        axes = drawn.axes
        axes.grid(axis="y")
        axes.plot(levels, shares, color=ACCENT, linewidth=1.75, clip_on=False)
        axes.plot([median, median, 0], [0, 50, 50], color=SECOND, linewidth=1, dashes=(3, 3))
        axes.annotate(f"half of the rows: {median:.0f}% or less", (median, 50), xytext=(7, -12),
                      textcoords="offset points", color=SECOND, weight="bold")  # fmt: skip
        axes.set_xlim(0, 200)
        axes.set_ylim(0, 102)
        axes.set_xticks([0, 50, 100, 150, 200])
        axes.set_xlabel("SMAPE of a row, %", loc="right", labelpad=3)
        _percent(axes)
        return drawn.svg(name, alt)


def dots(
    name: str,
    alt: str,
    rows: Sequence[Dot],
    axis: str,
    *,
    reference: float | None = None,
    marked: str = "",
    from_zero: bool = True,
) -> Markup:
    """A dot plot: a line per row, with its label, value and interval.

    Args:
        axis: what the values are, with their unit.
        reference: value at which a line is drawn through all rows.
        marked: what the reference is, written above it.
    """
    notes, labels = (
        max(map(width_of, texts)) for texts in ([row.note for row in rows], [cut(row.label) for row in rows])
    )
    top = 22.0 if marked else 8.0
    height = ROW * len(rows) + top + 38
    with canvas(height, left=10 + labels, right=14 + notes, top=top, bottom=38) as drawn:
        axes = drawn.axes
        _dot_axes(axes, rows, reference, from_zero)
        for number, row in enumerate(rows):
            _dot(drawn, number, row)
        if reference is not None:
            axes.axvline(reference, color=INK, linewidth=1, zorder=1)
            axes.annotate(marked, (reference, 1), xycoords=("data", "axes fraction"), xytext=(0, 5),
                          textcoords="offset points", ha="center", color=INK)  # fmt: skip
        axes.set_xlabel(axis, loc="right", labelpad=3)
        return drawn.svg(name, alt)


def _dot_axes(axes: Axes, rows: Sequence[Dot], reference: float | None, from_zero: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    ends = [end for row in rows for end in (row.low, row.high, row.value, reference) if end is not None]
    low, high = min(ends), max(ends)
    low = min(low, 0.0) if from_zero else low
    room = 0.05 * (high - low) or 1.0
    axes.set_xlim(low if low == 0 else low - room, high + room)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_yticks(range(len(rows)), labels=[cut(row.label) for row in rows])
    axes.tick_params(axis="y", labelcolor=INK)


def _dot(drawn: Canvas, number: int, row: Dot) -> None:
    colour = SECOND if row.is_second else ACCENT
    if row.low is not None and row.high is not None:
        drawn.axes.plot([row.low, row.high], [number, number], color=colour, linewidth=2.25, solid_capstyle="butt",
                        alpha=0.55)  # fmt: skip
    face = PAPER if row.is_second else colour
    drawn.axes.plot([row.value], [number], "o", markersize=7, color=face, markeredgecolor=colour, markeredgewidth=1.75)
    if row.note:
        drawn.axes.annotate(row.note, (1, number), xycoords=("axes fraction", "data"), xytext=(8, 0),
                            textcoords="offset points", va="center", color=MUTED)  # fmt: skip


def shares(name: str, alt: str, labels: Sequence[str], parts: np.ndarray, names: Sequence[str]) -> Markup:
    """Stacked bars of shares that add up to 1: a bar per label, [n labels, n names]."""
    shown, left = [COLOURS[f"level-{level}"] for level in (6, 4, 2, 5, 3, 1)], np.zeros(len(labels))
    height = ROW * len(labels) + 24 + 38
    with canvas(height, left=10 + max(map(width_of, labels)), right=18, top=24, bottom=38) as drawn:
        axes = drawn.axes
        for number, part in enumerate(parts.T):
            axes.barh(range(len(labels)), 100 * part, left=left, height=0.7, color=shown[number % len(shown)],
                      edgecolor=PAPER, linewidth=1)  # fmt: skip
            axes.annotate(names[number], (left[0] + 50 * part[0], 0), xytext=(0, 15), textcoords="offset points",
                          ha="center", color=MUTED)  # fmt: skip
            left = left + 100 * part
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_yticks(range(len(labels)), labels=list(labels))
        axes.set_xlabel("mean weight, %", loc="right", labelpad=3)
        return drawn.svg(name, alt)


def histogram(name: str, alt: str, values: np.ndarray, axis: str) -> Markup:
    """Histogram of percentages from 0 to 100."""
    edges = np.linspace(0, 100, 21)
    found = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
    with canvas(200, left=34, right=18, top=12, bottom=38) as drawn:
        axes = drawn.axes
        axes.grid(axis="y")
        axes.bar(edges[:-1], found, width=np.diff(edges) * 0.88, align="edge", color=ACCENT, linewidth=0)
        axes.set_xlim(0, 100)
        axes.set_xlabel(axis, loc="right", labelpad=3)
        _percent(axes)
        return drawn.svg(name, alt)


def overlaid(name: str, alt: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Markup:
    """A quantity by epoch for several runs, each with its label at the end of its line."""
    styles = [(ACCENT, "-"), (SECOND, "-"), (MUTED, "-"), (ACCENT, "--"), (SECOND, "--"), (MUTED, "--")]
    with canvas(260, left=40, right=30, top=14) as drawn:
        axes = drawn.axes
        axes.grid(axis="y")
        for number, (label, epochs, values) in enumerate(curves):
            colour, style = styles[number % len(styles)]
            axes.plot(epochs, values, color=colour, linestyle=style, linewidth=1.75)
            axes.annotate(label, (epochs[-1], values[-1]), xytext=(5, 0), textcoords="offset points", va="center",
                          color=colour, weight="bold")  # fmt: skip
        _whole_epochs(axes, [epoch for _, epochs, _ in curves for epoch in epochs])
        rooms = [_room(values) for _, _, values in curves]
        axes.set_xlim(0, max(epochs[-1] for _, epochs, _ in curves) * 1.02)
        axes.set_ylim(min(low for low, _ in rooms), max(high for _, high in rooms))
        axes.set_xlabel("epoch", loc="right", labelpad=3)
        return drawn.svg(name, alt)
