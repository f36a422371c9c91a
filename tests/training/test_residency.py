"""Rows that are mapped from the cache give the same bytes as rows in memory, in training, evaluation and prediction."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.demo.catalog import generate
from tests.conftest import DIMS, SMALL
from tests.forked import run_commands


def outputs(output: Path) -> dict[str, bytes]:
    """The files that decide or hold prices, by name; the checkpoint's state has times in it."""
    patterns = ("**/model.safetensors", "**/memory.safetensors", "**/submission.csv", "**/predictions.parquet")
    return {str(path.relative_to(output)): path.read_bytes() for name in patterns for path in output.glob(name)}


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_mapped_rows_give_the_same_bytes(shuffle: str, tmp_path: Path) -> None:
    generate(tmp_path / "data", n_products=403, n_test=100, dims=DIMS)
    cached = ["--cache", str(tmp_path / "cache"), "--residency", "mapped"]
    found = {}
    for name, flags in {"memory": [], "written": cached, "opened": cached}.items():
        where = ["--output", str(tmp_path / name), *flags]
        train = ["--data", str(tmp_path / "data"), *SMALL, "--epochs", "1", "--run-id", "r"]
        lines = [
            ["tests.small_blocks", *where, *train, "--shuffle", shuffle],
            ["fusion.all_embeddings.evaluate_by_groups", *where],
            ["fusion.all_embeddings.predict_test", *where, "--date", "2026-01-02"],
        ]
        done = run_commands(2, lines)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("event=cached_rows") == {"memory": 0, "written": 0, "opened": 3}[name]
        found[name] = outputs(tmp_path / name)
    assert len(found["memory"]) == 5
    assert found["memory"] == found["written"] == found["opened"]
    assert len(list((tmp_path / "cache").iterdir())) == 3  # all of train.csv, its validation rows, and test.csv
