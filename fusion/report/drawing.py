"""Draws charts with matplotlib as SVG that can be embedded in a page, in the colours of the page.

A chart is drawn in stand-in colours, which are replaced by CSS variables, so that the page's light and dark themes
apply to it. The same data give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from markupsafe import Markup

from fusion.terminal.escapes import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Name of a CSS variable of the page to the colour that stands for it while matplotlib draws.
COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "rule": "#030303",
    "accent": "#040404",
    "second": "#050505",
    "soft": "#060606",
    "paper": "#070707",
} | {f"level-{level}": f"#0{level}0a0a" for level in range(1, 7)}
N_LEVELS = 6  # shades of a density
# Charts are drawn this wide, and scaled to the width of their column: 0.9 times on a phone, 1.2 times on a desktop. So
# their texts, of 11 units, are as large as small text of the page on both.
WIDTH = 420
TEXT = 11.0
POINTS_PER_INCH = 72  # matplotlib measures figures in inches and writes SVG in points

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_STYLE = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "fusion",  # ids are the same each time
    "text.parse_math": False,  # a "$" in somebody's text is a dollar
    "font.size": TEXT,
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.major.size": 4,
    "ytick.major.size": 0,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.75,
}


class Canvas:
    """A figure with one pair of axes, whose size is in pixels.

    Args:
        left, right, top, bottom: margins around the axes.
    """

    def __init__(self, height: float, left: float, right: float, top: float, bottom: float) -> None:
        from matplotlib.figure import Figure

        size = (WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH)
        self.figure: Figure = Figure(figsize=size)
        across, up = WIDTH - left - right, height - top - bottom
        self.axes: Axes = self.figure.add_axes((left / WIDTH, bottom / height, across / WIDTH, up / height))

    def svg(self, name: str, alt: str) -> Markup:
        """The chart as an `<svg>` element.

        Args:
            name: unique on the page; it begins the ids of the chart's parts.
            alt: what the chart shows, for those who do not see it.
        """
        drawn = io.StringIO()
        with warnings.catch_warnings():
            # Glyphs that matplotlib's font lacks only matter for its layout: the browser draws texts with its own.
            warnings.simplefilter("ignore")
            self.figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        return _embedded(drawn.getvalue(), name, alt)


@contextmanager
def canvas(height: float, left: float = 34, right: float = 12, top: float = 10, bottom: float = 34) -> Iterator[Canvas]:
    """A canvas to draw on, in the style of the pages."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, _STYLE)):
        yield Canvas(height, left, right, top, bottom)


def cut(text: str, length: int = 24) -> str:
    """The text, printable, and shortened with an ellipsis to fit beside an axis."""
    shown = visible(" ".join(text.split()))
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def width_of(text: str) -> float:
    """About how wide a text is in a chart, for the margin beside an axis."""
    return sum(8.2 if letter.isupper() or letter in "mw_…%" else 6.2 for letter in text)


def _embedded(drawn: str, name: str, alt: str) -> Markup:
    # matplotlib made this SVG, and escaped all texts in it, so that the parser reads nothing that others wrote.
    root = ET.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used = {value for element in root.iter() for value in _references(element.attrib)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        element.attrib = dict(_attributes(element.attrib, name, used))
    _without_empty(root)
    root.attrib = {"role": "img", "aria-label": visible(alt), "viewBox": root.attrib["viewBox"]}
    text = ET.tostring(root, encoding="unicode", short_empty_elements=True)
    return Markup(re.sub(r"\s*\n\s*", " ", text))


def _references(attributes: dict[str, str]) -> list[str]:
    """Ids that these attributes refer to."""
    return [match[1] for value in attributes.values() for match in re.finditer(r"(?:url\()?#([mpC]\w+)\)?", value)]


def _attributes(attributes: dict[str, str], name: str, used: set[str]) -> Iterator[tuple[str, Any]]:
    for key, value in attributes.items():
        if key == "id":
            if value in used:
                yield key, f"{name}-{value}"
        elif key == _XLINK:
            yield "href", f"#{name}-{value[1:]}"
        elif key == "clip-path":
            yield key, value.replace("#", f"#{name}-")
        elif key == "style":
            yield key, _style(value)
        elif not (key == "transform" and value.startswith("rotate(-0 ")):
            yield key, value


def _style(style: str) -> str:
    style = re.sub(r"\s*font-family:[^;]*;?", "", style)  # texts use the fonts of the page
    for name, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{name})")
    return style.strip()


def _without_empty(element: ET.Element) -> None:
    """Removes groups without content, such as those of invisible axes."""
    for child in list(element):
        _without_empty(child)
        if child.tag in ("g", "defs") and not len(child):
            element.remove(child)
