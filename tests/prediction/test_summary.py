"""What a prediction says of its prices."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from fusion.all_embeddings import predict_test, train
from fusion.prediction import summary
from tests.conftest import SMALL
from tests.training.test_outcome import on_a_terminal


@pytest.fixture(scope="module")
def output(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output")
    flags = ["--data", str(catalog), "--output", str(output), "--run-id", "r", *SMALL]
    assert train.main([*flags, "--epochs", "1"]) == 0
    return output


def test_a_terminal_shows_quartiles_and_the_first_rows(output: Path) -> None:
    said = on_a_terminal("fusion.all_embeddings.predict_test", "--output", str(output), "--date", "2026-01-02")
    (submission,) = output.glob("submissions/test/2026-01-02/*/submission.csv")
    prices = pd.read_csv(submission, dtype={"sample_id": str})
    assert "Prices in $" in said and "training" in said and "event=prices" not in said
    assert f"{prices['price'].median():.2f}" in said
    assert all(sample_id in said for sample_id in prices["sample_id"].head(5))
    assert f"{len(prices)} rows are in {submission}" in said
    again = on_a_terminal("fusion.all_embeddings.predict_test", "--output", str(output), "--date", "2026-01-02")
    assert "published_before" in again
    assert said[said.index("Prices in $") :] == again[again.index("Prices in $") :]


def test_elsewhere_the_log_has_the_quartiles(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict_test.main(["--output", str(output), "--date", "2026-01-03", "--run-id", "r", "--name", "x"]) == 0
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "event=prices" in line]
    for field in ("low_quartile", "median", "high_quartile", "training_low", "training_median", "training_high"):
        assert f" {field}=" in line
    assert said.out == ""


def test_runs_of_earlier_versions_have_no_training_prices(capsys: pytest.CaptureFixture[str]) -> None:
    rows = pd.DataFrame({"sample_id": ["a", "b"], "price": [1.0, 2.0]})
    summary.show(rows, rows["price"].to_numpy(), None, "out/submission.csv")
    said = capsys.readouterr().out
    assert "predicted" in said and "training" not in said and "interval  " not in said
