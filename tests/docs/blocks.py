"""The blocks of code on the pages of documentation.

The word after the three backticks is the language; further words say what the tests do with the block (see
docs/development.md). Blocks inside a comment `<!-- hidden … -->` are run, but not shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("fusion/*/README.md")),
    ROOT / "k8s" / "README.md",
    ROOT / "slurm" / "README.md",
]
# Why a block is not run; its commands are checked by their parsers.
NOT_RUN = {"bucket", "cluster", "gpu", "hours", "image", "install", "service"}
LANGUAGES = {"python", "sh", "text", "toml", "mermaid"}
FENCE = re.compile(r"^( *)```([^`\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block, with its line on the page.

    Attributes:
        words: what follows the language.
    """

    page: str
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def runs(self) -> bool:
        """Whether the tests run it, or write it to a file."""
        is_code = self.language in ("python", "sh") and not NOT_RUN.intersection(self.words)
        return is_code or bool(self.value("file"))

    def value(self, name: str) -> str:
        """The value of a word such as `file=train.py`; empty if there is none, and `name` itself if it has no value."""
        found = [word for word in self.words if word.partition("=")[0] == name]
        return (found[0].partition("=")[2] or name) if found else ""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for fence in FENCE.finditer(text):
        language, *words = fence[2].split() or [""]
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(name_of(page), line, language, tuple(words), dedent(fence[3])))
    return found
