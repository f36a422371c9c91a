"""The chart of predicted against true prices, whose size does not depend on the number of rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from fusion.report.charts import INK, MUTED
from fusion.report.drawing import COLOURS, N_LEVELS, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEXAGONS = 34  # columns of the density, so that a hexagon is about as large as a letter


def density(name: str, alt: str, price: np.ndarray, predicted: np.ndarray) -> Markup:
    """Predicted against true price on logarithmic axes: a hexagon is darker the more rows it has."""
    true, found = np.log10(price), np.log10(predicted)
    across, up = _limits(true), _limits(found)
    with canvas(400, left=50, right=14, top=10, bottom=38) as drawn:
        axes = drawn.axes
        _hexagons(axes, true, found, (*across, *up))
        ends = np.array([min(*across, *up), max(*across, *up)])
        axes.plot(ends, ends, color=INK, linewidth=1)
        for shift in (-math.log10(2), math.log10(2)):
            axes.plot(ends, ends + shift, color=MUTED, linewidth=0.75, dashes=(3, 3))
        _dollar_axes(axes, across, up)
        axes.set_xlabel("true price", loc="right", labelpad=3)
        return drawn.svg(name, alt)


def _limits(logs: np.ndarray) -> tuple[float, float]:
    """Limits for log prices, with room; at least a factor of 4 apart."""
    low, high = float(logs.min()), float(logs.max())
    room = max(0.04 * (high - low), (math.log10(4) - (high - low)) / 2)
    return low - room, high + room


def _hexagons(axes: Axes, x: np.ndarray, y: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """Draws the density as one path per shade, which takes few bytes for any number of rows."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    found = axes.hexbin(x, y, gridsize=HEXAGONS, extent=extent, mincnt=1)
    counts, centres = np.asarray(found.get_array(), np.float64), np.asarray(found.get_offsets())
    corners = found.get_paths()[0].vertices
    found.remove()
    shades = _shades(counts)
    for shade in range(1, N_LEVELS + 1):
        paths = [Path(np.asarray(corners) + centre, closed=True) for centre in centres[shades == shade]]
        if paths:
            axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=COLOURS[f"level-{shade}"], linewidth=0))


def _shades(counts: np.ndarray) -> np.ndarray:
    """[n] shade from 1 to `N_LEVELS` of each count, on a logarithmic scale."""
    top = math.log(max(float(counts.max()), 2.0))
    found: np.ndarray = np.clip(np.ceil(np.log(np.maximum(counts, 1)) / top * N_LEVELS), 1, N_LEVELS)
    return found.astype(int)


def _dollar_axes(axes: Axes, across: tuple[float, float], up: tuple[float, float]) -> None:
    for axis, limits in ((axes.xaxis, across), (axes.yaxis, up)):
        ticks = _dollars(*limits)
        axis.set_ticks([math.log10(tick) for tick in ticks], labels=[f"${tick:,.12g}" for tick in ticks])
    axes.grid()
    axes.set_xlim(*across)
    axes.set_ylim(*up)


def _dollars(low: float, high: float) -> list[float]:
    """Round prices between two log prices: 1, 10, 100 …, with 2 and 5 in between if there is room."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [step * 10.0**decade for decade in decades for step in steps]
        inside = [value for value in found if low <= math.log10(value) <= high]
        if len(inside) <= 8:
            return inside
    every = -(-len(decades) // 8)  # prices over many decades
    return [10.0**decade for decade in list(decades)[::every] if low <= decade <= high]
