"""The tools that build the site: links between files of the repository, and drawings."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

from docs.tools.docstrings import with_blocks
from docs.tools.flowchart import svg
from docs.tools.hooks import on_page_markdown


def shown(markdown: str, page: str = "howto/nightly.md") -> str:
    return on_page_markdown(markdown, page=SimpleNamespace(file=SimpleNamespace(src_uri=page)))


def test_links_are_those_of_the_site() -> None:
    assert shown("[K](../../k8s/README.md#settings)") == "[K](../k8s.md#settings)"
    assert shown("[S](../scale.md)") == "[S](../scale.md)"
    assert shown("[P](docs/tutorial.md)", "index.md") == "[P](tutorial.md)"


def test_a_link_to_a_file_without_a_page_is_its_text() -> None:
    assert shown("[its settings](../../k8s/cluster.toml)") == "its settings"


def test_a_broken_link_stops_the_build() -> None:
    with pytest.raises(PluginError, match=r"links to \.\./nothing\.md"):
        shown("[N](../nothing.md)")


def test_blocks_show_neither_marks_nor_what_is_hidden() -> None:
    text = "a\n\n<!-- hidden\n```sh\nfalse\n```\n-->\n\n```sh fails=64\nfusion [x](y)\n```\n"
    assert shown(text) == "a\n\n```sh\nfusion [x](y)\n```\n"


def test_a_drawing_has_each_box_above_those_it_points_to() -> None:
    drawn = svg("flowchart TD\n    top --> middle & low[low & last]\n    middle --> low\n")
    tops = [float(top) for top in re.findall(r"<rect [^>]*y=\"([\d.]+)", drawn)]
    assert tops == sorted(tops) and len(set(tops)) == 3
    assert "low &amp; last" in drawn and drawn.count('class="head"') == 3


def test_a_drawing_that_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a -\.- b"):
        svg("flowchart TD\n    a -.- b\n")


def test_examples_in_docstrings_are_code() -> None:
    docstring = "Adds.\n\n>>> add(1, 2)  # doctest: +SKIP\n3\n\nArgs:\n    a: a number.\n"
    assert with_blocks(docstring) == "Adds.\n\n```pycon\n>>> add(1, 2)\n3\n```\n\nArgs:\n    a: a number.\n"
