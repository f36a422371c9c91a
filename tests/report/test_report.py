"""`report.html` of a run: what a real browser sees of it, and what it says of runs of all kinds."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

import fusion.report.pages
from fusion import log, storage
from fusion.all_embeddings import evaluate_by_groups, train
from fusion.records.run import REPORT, RunFolder
from fusion.report import __main__ as report
from fusion.report.pages import MAX_BYTES
from fusion.report.publish import try_report
from fusion.report.seal import seal_of
from fusion.verify.__main__ import verify
from tests.report.browser import Browser
from tests.report.conftest import TRAINING, Train


def page_of(run: RunFolder) -> Path:
    return Path(run.at(REPORT))


def text_of(run: RunFolder) -> str:
    return page_of(run).read_text()


class Outline(HTMLParser):
    """Collects headings, ids and the elements that could request or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.forbidden: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in ("script", "iframe", "object", "embed", "img", "form"):
            self.forbidden.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.forbidden.append(name)
            if name in ("href", "src") and not (value or "").startswith(("#", "data:,", "../runs/")):
                self.forbidden.append(f"{name}={value}")
            self.references += re.findall(r"#([\w-]+)\)?$", value or "") if name in ("href", "clip-path") else []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_finds_no_fault(full_run: RunFolder, chromium: Browser, width: int, dark: bool) -> None:
    seen = chromium.see(page_of(full_run), width=width, dark=dark, axe=True)
    assert seen.said == [] and seen.dialogs == []
    assert seen.requested == {page_of(full_run).resolve().as_uri()}
    assert seen.overflow == 0
    assert seen.findings == []


def test_hostile_texts_are_shown_as_they_are(full_run: RunFolder, chromium: Browser) -> None:
    text = chromium.see(page_of(full_run)).text
    assert '<script>alert(1)</script>"><img src=x onerror=alert(2)> $x_1$ {{ 7 * 7 }}' in text
    assert "\x1b" not in text_of(full_run)


def test_the_page_contains_nothing_that_runs_or_requests(full_run: RunFolder) -> None:
    outline = Outline(text_of(full_run))
    assert outline.forbidden == []
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.references) <= set(outline.ids)
    assert "<html lang=" in text_of(full_run) and "default-src 'none'" in text_of(full_run)
    assert len(page_of(full_run).read_bytes()) < MAX_BYTES


def test_headings_are_in_order(full_run: RunFolder) -> None:
    headings = Outline(text_of(full_run)).headings
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(headings))


def test_every_chart_has_a_text_and_every_section_its_files(full_run: RunFolder) -> None:
    page = text_of(full_run)
    assert page.count("<svg ") == page.count('role="img" aria-label=') >= 11
    assert page.count("<section ") == page.count('class="source"') + page.count("has not been measured")


def test_the_same_run_gives_the_same_bytes(full_run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = page_of(full_run).read_bytes()
    for flags in (["--run-dir", full_run.url], ["--output", full_run.output, "--run-id", "full"]):
        assert report.main(flags) == 0
        assert page_of(full_run).read_bytes() == before
        assert capsys.readouterr().out == f"{full_run.at(REPORT)}\n"


def test_the_score_is_that_of_the_checkpoint(full_run: RunFolder) -> None:
    smape = full_run.best().smape
    assert f'<span class="value">{smape:.2f}<span' in text_of(full_run)


def test_a_report_elsewhere_leaves_the_run_as_it_is(full_run: RunFolder, tmp_path: Path) -> None:
    before = page_of(full_run).stat().st_mtime_ns
    assert report.main(["--run-dir", full_run.url, "--to", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == page_of(full_run).read_bytes()
    assert page_of(full_run).stat().st_mtime_ns == before


def test_a_run_that_was_only_trained_says_how_to_learn_more(trained: Train) -> None:
    page = text_of(trained())
    assert "python -m fusion.ablation" in page
    assert "python -m fusion.all_embeddings.evaluate_by_groups" in page
    assert "What a prediction is made of" not in page
    assert "Coverage of the 90% intervals" in page


def test_an_evaluation_adds_texts_and_comparable_products(trained: Train) -> None:
    run = trained()
    before = text_of(run)
    assert evaluate_by_groups.main(["--output", run.output, "--run-id", "r"]) == 0
    assert "Comparable products" not in before and "Comparable products" in text_of(run)
    worst = json.loads(storage.read(run.at("metrics", "summary.json")))["worst"][0]
    assert len(worst["comparables"]) == 5 and all(text["catalog_content"] for text in worst["comparables"].values())


def test_without_baselines_the_median_price_comes_from_the_log(trained: Train) -> None:
    run = trained()
    page_with = text_of(run)
    storage.remove(run.at("baselines.json"))
    assert report.main(["--run-dir", run.url]) == 0
    assert "ridge regression" in page_with and "ridge regression" not in text_of(run)
    assert "median price" in text_of(run)


def test_runs_of_the_published_recipe_show_their_gate(trained: Train) -> None:
    run = trained("--recipe", "published", "--model", "fusion", "--n-heads", "2", "--epochs", "2")
    assert evaluate_by_groups.main(["--output", run.output, "--run-id", "r"]) == 0
    page = text_of(run)
    assert "The gate mixes 3 experts" in page
    assert "Because the validation rows chose the epoch" in page
    assert "--recipe published" in page


def test_runs_over_all_folds(trained: Train) -> None:
    page = text_of(trained("--folds", "3"))
    assert "All 3 folds were trained, so that every row validates once." in page
    assert "--folds 3" in page


def test_equal_prices(catalog: Path, tmp_path: Path, trained: Train) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    table = pd.read_csv(data / "train.csv", dtype={"sample_id": "str"}).assign(price=7.5)
    table.to_csv(data / "train.csv", index=False)
    page = text_of(trained(data=data))
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "every row has the same price" in page


def test_a_finished_run_without_a_report_gets_it_from_the_same_command(catalog: Path, trained: Train) -> None:
    run = trained()
    before, flags = page_of(run).read_bytes(), ["--data", str(catalog), "--output", run.output, "--run-id", "r"]
    page_of(run).unlink()
    assert train.main([*flags, *TRAINING]) == 0
    assert page_of(run).read_bytes() == before
    changed = page_of(run).stat().st_mtime_ns
    assert train.main([*flags, *TRAINING]) == 0
    assert page_of(run).stat().st_mtime_ns == changed


def test_a_failure_only_warns(
    trained: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> bytes:
        raise RuntimeError("no chart\ntoday")

    monkeypatch.setattr(fusion.report.pages, "run_pages", fail)
    run = trained()
    assert not page_of(run).exists()
    assert "event=report_not_written" in log.text() and "no chart today" in capsys.readouterr().err


def test_a_damaged_evaluation_is_left_out(full_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(full_run.url, tmp_path / "runs" / "full")
    run = RunFolder.named(str(tmp_path), "full")
    Path(run.at("metrics", "summary.json")).write_text("{}")
    try_report(run)
    assert "is damaged or being replaced, and is left out" in text_of(run)


def test_other_versions_settings_are_shown_without_defaults(of_another_version: RunFolder) -> None:
    assert "does not know the variant of this run, or one of its settings" in text_of(of_another_version)


@pytest.mark.parametrize("part", ["first byte", "last line", "another run", "no seal"])
def test_verify_finds_a_changed_page(full_run: RunFolder, tmp_path: Path, part: str) -> None:
    shutil.copytree(full_run.url, tmp_path / "runs" / "full")
    page = tmp_path / "runs" / "full" / REPORT
    content = page.read_bytes()
    changed = {
        "first byte": b"x" + content[1:],
        "last line": content.replace(b" -->\n", b"0 -->\n")[-len(content) :],
        "another run": content.replace(b"report of full sha", b"report of other sha"),
        "no seal": content[: content.rindex(b"<!--")],
    }[part]
    assert changed != content
    page.write_bytes(changed)
    assert [str(found) for found in verify(str(tmp_path / "runs" / "full")) if found.verdict == "BAD"]


def test_a_run_of_an_earlier_version_has_no_report(full_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(full_run.url, tmp_path / "runs" / "full")
    (tmp_path / "runs" / "full" / REPORT).unlink()
    assert not [found for found in verify(str(tmp_path / "runs" / "full")) if found.verdict == "BAD"]


def test_without_a_log_the_sources_have_their_dimensions(full_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(full_run.url, tmp_path / "runs" / "full")
    run = RunFolder.named(str(tmp_path), "full")
    before = text_of(run)
    Path(run.at("attempts", "1", "log.txt")).unlink()
    try_report(run)
    assert "share missing" in before and "share missing" not in text_of(run)
    assert "<caption>The sources</caption>" in text_of(run)


def test_verify_notes_a_report_from_before_the_evaluation(trained: Train) -> None:
    run = trained()
    before = page_of(run).read_bytes()
    assert evaluate_by_groups.main(["--output", run.output, "--run-id", "r"]) == 0
    assert not [found for found in verify(run.url) if "does not show the evaluation" in found.what]
    page_of(run).write_bytes(before)
    (note,) = [found for found in verify(run.url) if "does not show the evaluation" in found.what]
    assert note.verdict == "note"


def test_the_report_is_the_same_from_any_folder(
    full_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(full_run.output)
    assert report.main(["--run-dir", "runs/full", "--to", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == page_of(full_run).read_bytes()


def test_the_seal_names_the_run(full_run: RunFolder) -> None:
    seal = seal_of(page_of(full_run).read_bytes())
    assert seal is not None and seal.about == "full" and seal.is_whole


def test_the_command_wants_one_thing_to_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([]) == 64
    assert "expected one of --run-id, --run-dir, --compare, --index, none is given" in capsys.readouterr().err
    assert report.main(["--index", "--run-id", "r"]) == 64
    assert "--run-id and --index are given" in capsys.readouterr().err


def test_a_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--run-dir", str(tmp_path)]) == 65
    assert "it is not the folder of a run" in capsys.readouterr().err
    assert report.main(["--output", str(tmp_path), "--run-id", "r"]) == 65
