"""docs/architecture.md is true: its drawing shows the imports, its paths exist, and it stays short.

After a change that is meant, `python -m tests.test_architecture` draws it again.
"""

from __future__ import annotations

import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- made by `python -m tests.test_architecture`; do not edit -->\n"
END = "<!-- end -->\n"
MAX_LINES = 120


def drawing() -> str:
    """A Mermaid flowchart of the rooms, without arrows that follow from others."""
    arrows = without_implied(imports_between_rooms())
    lines = [f"    {importer} --> {' & '.join(sorted(arrows[importer]))}" for importer in sorted(arrows)]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def imports_between_rooms() -> dict[str, set[str]]:
    """Room to the rooms that its modules import."""
    graph = grimp.build_graph("fusion", cache_dir=None)
    rooms = {name: room_of(name) for name in graph.modules}
    found: dict[str, set[str]] = {}
    for name, room in rooms.items():
        for imported in graph.find_modules_directly_imported_by(name):
            if room and rooms[imported] and rooms[imported] != room:
                found.setdefault(room, set()).add(rooms[imported])
    return found


def room_of(module: str) -> str:
    """`fusion.data.tables` is in data; modules directly in fusion/ are in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / "fusion" / parts[1]).is_dir() else ""


def without_implied(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The transitive reduction of an acyclic graph."""

    def below(room: str) -> set[str]:
        return set().union(*({one} | below(one) for one in arrows.get(room, set())))

    return {room: {one for one in to if not any(one in below(other) for other in to)} for room, to in arrows.items()}


def test_the_drawing_shows_the_imports() -> None:
    drawn = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert drawn == drawing(), "draw it again with `python -m tests.test_architecture`"


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text().splitlines()) <= MAX_LINES


def paths() -> list[str]:
    words = re.findall(r"`([\w/]+(?:\.py|/))`", PAGE.read_text())
    return sorted({word for word in words if not word.startswith("checkpoints")})


@pytest.mark.parametrize("path", paths())
def test_the_paths_exist(path: str) -> None:
    assert any((parent / path).exists() for parent in (ROOT, ROOT / "fusion"))


def test_every_room_is_drawn() -> None:
    rooms = {path.parent.name for path in (ROOT / "fusion").glob("*/__init__.py")}
    text = drawing()
    assert {room for room in rooms if not re.search(rf"\b{room}\b", text)} == set()


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + drawing() + END + rest.split(END, 1)[1])
