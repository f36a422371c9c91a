"""Hooks of mkdocs: pages that lie elsewhere in the repository, links between them, and drawings without scripts.

The README files stay where a reader of the repository looks for them, and become pages of the site as well. Links
are written for the repository (`../k8s/README.md`), and are translated here. A link to a file that does not exist
stops the build.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# mkdocs runs this file without the repository in the path.
import fusion  # noqa: E402
from docs.tools.flowchart import svg  # noqa: E402

# Page of the site -> file of the repository.
FROM_REPOSITORY = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "k8s.md": "k8s/README.md",
    "slurm.md": "slurm/README.md",
    "variants/qwen_clip.md": "fusion/qwen_clip/README.md",
    "variants/all_embeddings.md": "fusion/all_embeddings/README.md",
}
PAGES = {path: page for page, path in FROM_REPOSITORY.items()}
PUBLIC = re.compile(r"^::: fusion\.(\w+)$", re.MULTILINE)
FENCE = re.compile(r"^( *)```(.*?)^\1```$", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"<!-- hidden\n.*?-->\n*", re.DOTALL)  # blocks that only the tests run
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    for page, path in FROM_REPOSITORY.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    origin = FROM_REPOSITORY.get(uri, f"docs/{uri}")
    markdown = PUBLIC.sub(_documented, HIDDEN.sub("", markdown))
    parts: list[str] = []
    end = 0
    for fence in FENCE.finditer(markdown):
        parts += [_linked(markdown[end : fence.start()], origin, uri), _shown(fence)]
        end = fence.end()
    return "".join([*parts, _linked(markdown[end:], origin, uri)])


def _documented(name: re.Match[str]) -> str:
    """A public name of `fusion` under that name, with the documentation of the module that defines it."""
    module = fusion._EXPORTS.get(name[1])
    if module is None:
        return name[0]
    path = f"fusion.{module}" if name[1] == "pointers" else f"fusion.{module}.{name[1]}"
    return f"::: {path}\n    options: {{heading: fusion.{name[1]}, heading_level: 2, toc_label: {name[1]}}}"


def _shown(fence: re.Match[str]) -> str:
    """A block of code as the site shows it: a drawing as SVG, other blocks without the marks of the tests."""
    indent, text = fence.groups()
    info, _, body = text.partition("\n")
    if info == "mermaid":
        return svg(body)
    language, *words = info.split() or ["text"]
    titles = [f' title="{word.removeprefix("file=")}"' for word in words if word.startswith("file=")]
    return f"{indent}```{language}{''.join(titles)}\n{body}{indent}```"


def _linked(text: str, origin: str, page: str) -> str:
    def replaced(link: re.Match[str]) -> str:
        shown, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if not (ROOT / path).exists():
            raise PluginError(f"{origin} links to {target}, but there is no {path}")
        uri = PAGES.get(path) or path.removeprefix("docs/")
        if uri == path:  # a file that the site does not have
            return shown
        return f"[{shown}]({posixpath.relpath(uri, posixpath.dirname(page) or '.')}{anchor or ''})"

    return LINK.sub(replaced, text)
