"""Pages about several runs: comparisons, and the leaderboard of an output."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from fusion.all_embeddings import train
from fusion.ensemble import __main__ as ensemble
from fusion.records.run import RunFolder
from fusion.report import __main__ as report
from fusion.verify.__main__ import verify
from tests.made_runs import make_run
from tests.report.browser import Browser
from tests.report.conftest import TRAINING
from tests.report.test_report import Outline


@pytest.fixture(scope="module")
def output(hostile_data: Path, full_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with two runs on the same rows, one on others, and one that failed before it had read its data."""
    output = tmp_path_factory.mktemp("several")
    shutil.copytree(full_run.url, output / "runs" / "full")
    for run_id, flags in {"wide": ["--width", "32"], "other": ["--seed", "42"]}.items():
        where = ["--data", str(hostile_data), "--output", str(output), "--run-id", run_id]
        assert train.main([*where, *TRAINING, *flags]) == 0
    make_run(str(output), "failed", smapes=(), code=65, error="<b>no</b> data")
    return output


def written(capsys: pytest.CaptureFixture[str], *flags: str) -> Path:
    capsys.readouterr()
    assert report.main(list(flags)) == 0
    return Path(capsys.readouterr().out.strip())


def test_the_index_has_a_leaderboard_per_set_of_rows(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = written(capsys, "--output", str(output), "--index")
    assert page == output / "reports" / "index.html"
    text = page.read_text()
    assert "Leaderboard 1" in text and "Leaderboard 2" in text and "Runs without a score" in text
    assert text.index('href="../runs/other/') > text.index('href="../runs/wide/') < text.index("Leaderboard 2")
    assert "failed with 65" in text
    assert (page.parent / "../runs/wide/report.html").exists()


def test_the_index_elsewhere_has_no_links(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = written(capsys, "--output", str(output), "--index", "--to", str(tmp_path / "all.html"))
    assert page == tmp_path / "all.html"
    assert "../runs/" not in page.read_text() and "wide" in page.read_text()


def test_an_empty_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no run under" in written(capsys, "--output", str(tmp_path), "--index").read_text()


def test_a_comparison(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = written(capsys, "--output", str(output), "--compare", "full", "wide", "other")
    text = page.read_text()
    assert page.parent == output / "reports" and page.name.startswith("compare-")
    for words in ("Metrics side by side", "Difference to the best run", "Settings that differ", "Listed apart"):
        assert words in text
    assert "<code>width</code>" in text and "<code>seed</code>" in text
    assert (
        page.read_bytes() == written(capsys, "--output", str(output), "--compare", "full", "wide", "other").read_bytes()
    )


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_finds_no_fault(
    output: Path, chromium: Browser, capsys: pytest.CaptureFixture[str], dark: bool
) -> None:
    assert ensemble.main(["full", "wide", "--output", str(output), "--run-id", "mix"]) == 0
    pages = [
        output / "runs/mix/report.html",
        written(capsys, "--output", str(output), "--index"),
        written(capsys, "--output", str(output), "--compare", "full", "wide"),
    ]
    for page in pages:
        seen = chromium.see(page, width=390, dark=dark, axe=True)
        assert (seen.said, seen.dialogs, seen.overflow, seen.findings) == ([], [], 0, [])
        assert seen.requested == {page.resolve().as_uri()}
        outline = Outline(page.read_text())
        assert outline.forbidden == [] and len(outline.ids) == len(set(outline.ids))


def test_verify_checks_these_pages(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = written(capsys, "--output", str(output), "--index")
    before = page.read_bytes()
    page.write_bytes(before.replace(b"Leaderboard 1", b"Leaderboard 3"))
    assert any("reports: index.html" in str(found) for found in verify(str(output)) if found.verdict == "BAD")
    page.write_bytes(before)
    assert not any("reports" in str(found) for found in verify(str(output)) if found.verdict == "BAD")


def test_two_runs_are_needed(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--output", str(output), "--compare", "full"]) == 64
    assert "expected at least two runs" in capsys.readouterr().err


def test_a_damaged_run_is_listed_without_a_score(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(output, tmp_path / "output")
    (tmp_path / "output/runs/wide/split.parquet").write_bytes(b"no rows")
    text = written(capsys, "--output", str(tmp_path / "output"), "--index").read_text()
    assert text.index("Runs without a score") < text.rindex("../runs/wide/")


def test_prices_of_a_run_over_several_orders_of_magnitude(
    hostile_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(hostile_data, data)
    table = pd.read_csv(data / "train.csv", dtype={"sample_id": "str"})
    table["price"] = table["price"] ** 9 / 1e9
    table.to_csv(data / "train.csv", index=False)
    where = ["--data", str(data), "--output", str(tmp_path / "output"), "--run-id", "r"]
    assert train.main([*where, *TRAINING]) == 0
    assert "Predicted against true price" in (tmp_path / "output/runs/r/report.html").read_text()
    assert "report_not_written" not in capsys.readouterr().err
