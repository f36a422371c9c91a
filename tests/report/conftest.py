"""Fixtures of the tests of reports: a run with everything, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from fusion.ablation import __main__ as ablation
from fusion.all_embeddings import evaluate_by_groups, train
from fusion.records.run import RunFolder
from fusion.report.publish import try_report
from tests.conftest import SMALL
from tests.report.browser import Browser, browser, install
from tests.services import require

TRAINING = [*SMALL, "--epochs", "3", "--max-missing", "0.5"]
HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)> $x_1$ {{ 7 * 7 }} `code` \x1b[2J'

Train = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    require(install(), "chromium, which `apt-get install chromium` installs,")
    with browser() as found:
        yield found


@pytest.fixture(scope="session")
def hostile_data(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalog, whose texts and categories try to break out of a page."""
    data = tmp_path_factory.mktemp("hostile") / "data"
    shutil.copytree(catalog, data)
    table = pd.read_csv(data / "train.csv", dtype={"sample_id": "str"})
    table["catalog_content"] = table["catalog_content"].astype("str") + f" {HOSTILE}"
    table["category"] = table["category"].astype("str") + f" {HOSTILE}"
    table.to_csv(data / "train.csv", index=False)
    return data


@pytest.fixture(scope="session")
def full_run(hostile_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was evaluated and ablated; tests that change it must copy its output first."""
    where = ["--output", str(tmp_path_factory.mktemp("full")), "--run-id", "full"]
    assert train.main(["--data", str(hostile_data), *where, *TRAINING]) == 0
    assert evaluate_by_groups.main([*where, "--by", "category"]) == 0
    assert ablation.main(where) == 0
    return RunFolder.named(where[1], "full")


@pytest.fixture
def of_another_version(full_run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the full run with a setting that this version does not know, and its report."""
    shutil.copytree(full_run.url, tmp_path / "runs" / "full")
    run = RunFolder.named(str(tmp_path), "full")
    config = Path(run.at("config.json"))
    config.write_text(config.read_text().replace('"width": 16', '"breadth": 16'))
    try_report(run)
    return run


@pytest.fixture
def trained(catalog: Path, tmp_path: Path) -> Train:
    """Trains a run with further flags, and returns it."""

    def run(*flags: str, data: Path = catalog, run_id: str = "r") -> RunFolder:
        where = ["--data", str(data), "--output", str(tmp_path), "--run-id", run_id]
        assert train.main([*where, *TRAINING, *flags]) == 0
        return RunFolder.named(str(tmp_path), run_id)

    return run
