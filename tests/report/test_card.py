"""`model_card.md` of a run: its metadata, and what a Markdown renderer makes of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

import fusion
from fusion.records.run import CARD, RunFolder
from fusion.report import __main__ as report
from fusion.report.blocks import Table
from fusion.report.card import MOST_ROWS, sentence, table
from fusion.report.seal import seal_of
from fusion.verify.__main__ import verify
from tests.conftest import DIMS
from tests.report.conftest import Train

MARKDOWN = MarkdownIt("commonmark").enable("table")


def card_of(run: RunFolder) -> str:
    return Path(run.at(CARD)).read_text()


def body_of(run: RunFolder) -> str:
    """The card without its front matter, as HTML."""
    return MARKDOWN.render(card_of(run).split("---\n", 2)[2])


def cells(html: str) -> Iterator[list[str]]:
    """The texts of the cells of each row of each table, without code marks."""
    for row in re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL):
        yield [re.sub(r"</?code>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]


def test_the_metadata_have_the_metrics_of_the_validation_rows(full_run: RunFolder) -> None:
    metadata = yaml.safe_load(card_of(full_run).split("---\n")[1])
    assert metadata["pipeline_tag"] == "tabular-regression" and "all_embeddings" in metadata["tags"]
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    metrics = {one["type"]: one["value"] for one in result["metrics"]}
    assert model["name"] == "full" and result["task"]["type"] == "tabular-regression"
    assert result["dataset"]["name"] == full_run.settings()["data"]
    assert metrics.keys() == {"smape", "mae", "rmse", "r2"}
    assert metrics["smape"] == pytest.approx(full_run.best().smape, rel=1e-5)


def test_the_tables_have_the_score_the_inputs_and_the_groups(full_run: RunFolder) -> None:
    rows = {row[0]: row[1:] for row in cells(body_of(full_run)) if len(row) > 1}
    assert rows["this run"][0] == f"{full_run.best().smape:.2f}"
    assert {"median price", "ridge regression", "all rows"} <= rows.keys()
    assert {role: rows[role][1] for role in DIMS} == {role: str(dim) for role, dim in DIMS.items()}
    assert rows["model.safetensors"][0] == full_run.best().model_sha256


def test_every_table_has_as_many_cells_as_headings(full_run: RunFolder) -> None:
    for found in re.findall(r"<table>(.*?)</table>", body_of(full_run), re.DOTALL):
        assert len({len(row) for row in cells(found)}) == 1


def test_hostile_texts_are_shown_as_they_are(full_run: RunFolder) -> None:
    html = body_of(full_run)
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\x1b" not in card_of(full_run)


def test_markdown_in_texts_means_nothing() -> None:
    html = MARKDOWN.render(sentence("*a* _b_ [c](http://d) <e> &lt; # f ~~g~~ snake_case | \\"))
    assert re.search("<(em|strong|a|e|h1|s|code|script)>", html) is None
    assert "*a* _b_ [c](http://d) &lt;e&gt; &amp;lt; # f ~~g~~ snake_case | \\" in html


def test_code_stays_code() -> None:
    assert MARKDOWN.render(sentence("type `a --b_c <d>` *now*")) == "<p>type <code>a --b_c &lt;d&gt;</code> *now*</p>\n"


def test_a_long_table_is_cut() -> None:
    shown = Table("numbers", ("n", "code"), [(str(n), f"a|{n}`") for n in range(MOST_ROWS + 5)], code=frozenset({1}))
    html = MARKDOWN.render(table(shown))
    assert len(list(cells(html))) == 1 + MOST_ROWS
    assert [f"{MOST_ROWS - 1}", f"a|{MOST_ROWS - 1}`"] in list(cells(html))
    assert f"The first {MOST_ROWS} of {MOST_ROWS + 5} rows" in html


def test_its_python_opens_the_model(full_run: RunFolder) -> None:
    (call,) = re.findall(r"^model = (fusion\.load\(.*\))$", card_of(full_run), re.MULTILINE)
    assert eval(call, {"fusion": fusion}).run_id == "full"


def test_the_same_run_gives_the_same_bytes(full_run: RunFolder, tmp_path: Path) -> None:
    before, changed = card_of(full_run), Path(full_run.at(CARD)).stat().st_mtime_ns
    assert report.main(["--run-dir", full_run.url, "--to", str(tmp_path / "page.html")]) == 0
    assert Path(full_run.at(CARD)).stat().st_mtime_ns == changed, "a report elsewhere leaves the run as it is"
    assert report.main(["--run-dir", full_run.url]) == 0
    assert card_of(full_run) == before
    seal = seal_of(before.encode())
    assert seal is not None and seal.is_whole and seal.about == "full"


def test_verify_finds_a_changed_card(full_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(full_run.url, tmp_path / "runs" / "full")
    card = tmp_path / "runs" / "full" / CARD
    card.write_text(card.read_text().replace("SMAPE **", "SMAPE **1"))
    (found,) = [one for one in verify(str(tmp_path / "runs" / "full")) if one.verdict == "BAD"]
    assert "model_card.md" in str(found)


def test_the_card_says_that_settings_are_not_known(of_another_version: RunFolder) -> None:
    assert "does not know the variant of this run" in card_of(of_another_version)


def test_runs_over_all_folds(trained: Train) -> None:
    card = card_of(trained("--folds", "3"))
    assert "All 3 folds were trained, so that every row validates once." in card
    assert "trained neither on it nor on a near-duplicate of it" in card
