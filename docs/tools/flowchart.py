"""Draws a Mermaid `flowchart TD` as SVG when the site is built, so that pages load no script from elsewhere.

It knows the lines `a --> b & c` and `a[label]`. Nodes lie in rows: each is below all that point to it. Within a row,
nodes are ordered by the mean position of their neighbours, which keeps crossings few.
"""

from __future__ import annotations

import re
from html import escape
from itertools import pairwise, product

Arrows = list[tuple[str, str]]
# Pixels: size of a letter, space around a label, distances of boxes and of rows.
LETTER, PADDING, HEIGHT, GAP, ROW = 7.6, 12, 28, 18, 74
SWEEPS = 12  # of the ordering; on drawings of this size nothing changes after about eight
BETWEEN_NODES = re.compile(r"&(?![^\[]*\])")  # not within a label
NODE = re.compile(r"(\w+)(?:\[\"?(.*?)\"?\])?")


def svg(text: str) -> str:
    """The drawing as one line of SVG, which Markdown leaves as it is."""
    labels, arrows = _parsed(text)
    rows = _ordered(_rows(list(labels), arrows), arrows)
    width = {name: PADDING * 2 + LETTER * len(label) for name, label in labels.items()}
    centre = _centres(rows, width)
    total = max(x + width[name] / 2 for name, (x, _) in centre.items()) + 4
    parts = [_arrow(centre[start], centre[end]) for start, end in arrows]
    parts += [_box(*centre[name], width[name], label) for name, label in labels.items()]
    size = f'viewBox="0 0 {total:.0f} {len(rows) * ROW - 30}" width="{total:.0f}"'
    return (
        f'<svg class="flowchart" role="img" aria-label="Flowchart; its text is above" {size}>{"".join(parts)}</svg>\n'
    )


def _parsed(text: str) -> tuple[dict[str, str], Arrows]:
    labels: dict[str, str] = {}
    arrows: Arrows = []
    for line in text.strip().splitlines()[1:]:
        groups = [_nodes(group, line, labels) for group in line.split("-->")]
        arrows += [arrow for above, below in pairwise(groups) for arrow in product(above, below)]
    return labels, arrows


def _nodes(text: str, line: str, labels: dict[str, str]) -> list[str]:
    """The names of nodes such as `a & b[label]`; adds their labels."""
    names = []
    for node in BETWEEN_NODES.split(text):
        match = NODE.fullmatch(node.strip())
        if match is None:
            raise ValueError(f"the flowchart has the line {line!r}, expected a --> b & c, or a[label]")
        name, label = match.groups()
        labels[name] = label or labels.get(name, name)
        names.append(name)
    return names


def _rows(names: list[str], arrows: Arrows) -> list[list[str]]:
    depth = dict.fromkeys(names, 0)
    for _ in names:  # the longest path has at most so many arrows
        for start, end in arrows:
            depth[end] = max(depth[end], depth[start] + 1)
    return [[name for name in names if depth[name] == row] for row in range(max(depth.values()) + 1)]


def _ordered(rows: list[list[str]], arrows: Arrows) -> list[list[str]]:
    place = {name: index - len(row) / 2 for row in rows for index, name in enumerate(row)}
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else reversed(rows):
            row.sort(key=lambda name: _mean_place(name, arrows, place))
            place |= {name: index - len(row) / 2 for index, name in enumerate(row)}
    return rows


def _mean_place(name: str, arrows: Arrows, place: dict[str, float]) -> float:
    below = [place[end] for start, end in arrows if start == name]
    above = [place[start] for start, end in arrows if end == name]
    near = below + above
    return sum(near) / len(near) if near else place[name]


def _centres(rows: list[list[str]], width: dict[str, float]) -> dict[str, tuple[float, float]]:
    lengths = [sum(width[name] for name in row) + GAP * (len(row) - 1) for row in rows]
    centre = {}
    for index, row in enumerate(rows):
        left = (max(lengths) - lengths[index]) / 2 + 4
        for name in row:
            centre[name] = (left + width[name] / 2, index * ROW + HEIGHT / 2 + 4)
            left += width[name] + GAP
    return centre


def _box(x: float, y: float, width: float, label: str) -> str:
    box = f'<rect x="{x - width / 2:.1f}" y="{y - HEIGHT / 2:.1f}" width="{width:.1f}" height="{HEIGHT}" rx="5"/>'
    return f'{box}<text x="{x:.1f}" y="{y + 4.5:.1f}" text-anchor="middle">{escape(label)}</text>'


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = start, end
    y, to_y = y + HEIGHT / 2, to_y - HEIGHT / 2
    bend = (to_y - y) / 2
    curve = f"M{x:.1f},{y:.1f} C{x:.1f},{y + bend:.1f} {to_x:.1f},{to_y - bend:.1f} {to_x:.1f},{to_y - 5:.1f}"
    head = f"M{to_x - 4:.1f},{to_y - 7:.1f} L{to_x + 4:.1f},{to_y - 7:.1f} L{to_x:.1f},{to_y:.1f} Z"
    return f'<path d="{curve}"/><path class="head" d="{head}"/>'
