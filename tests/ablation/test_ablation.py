"""Ablation: hiding a source gives the same metrics as data that really lack it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from fusion.ablation import __main__ as ablation
from fusion.all_embeddings import evaluate_by_groups, train
from fusion.compare.standard_errors import clustered_mean
from fusion.demo.catalog import generate
from fusion.metrics import row_smape
from fusion.records.run import RunFolder
from fusion.verify.__main__ import verify
from tests.conftest import DIMS, SMALL, run_command
from tests.verify.test_verify_everything import is_found, mutations

PUBLISHED = [*SMALL, "--recipe", "published"]

Capture = pytest.CaptureFixture[str]

ROLES = ["clip_image", "siglip_image", "siglip_text", "qwen_text"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and output/, which contains a run and its ablation."""
    folder = tmp_path_factory.mktemp("ablation")
    generate(folder / "data", n_products=303, dims=DIMS)
    where = ["--output", str(folder / "output"), "--run-id", "r", "--device", "cpu"]
    assert train.main(["--data", str(folder / "data"), *where, *PUBLISHED, "--epochs", "4"]) == 0
    assert ablation.main(where) == 0
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "output/runs/r/metrics/ablation.json").read_text())
    return found


def wrong(output: Path) -> list[str]:
    return [str(finding) for finding in verify(str(output)) if finding.verdict == "BAD"]


def test_all_sets_are_computed_and_shapley_values_add_up(made: Path) -> None:
    found = record(made)
    assert len(found["sets"]) == 16
    assert found["sets"]["none"] == found["nothing"] and found["sets"][" ".join(ROLES)] == found["everything"]
    best = RunFolder(str(made / "output/runs/r")).best()
    assert found["everything"] == pytest.approx(best.smape, rel=1e-6) and found["checkpoint"] == best.name
    assert sum(one["shapley"]["mean"] for one in found["sources"]) == pytest.approx(
        found["nothing"] - found["everything"]
    )
    for one in found["sources"]:
        assert one["alone"] == found["sets"][one["role"]]
        assert one["lost"]["mean"] == pytest.approx(one["without"] - found["everything"], abs=1e-5)
        assert one["shapley"]["low"] < one["shapley"]["mean"] < one["shapley"]["high"]


def test_rows_are_predicted_by_members_that_held_them_out(copied: Path) -> None:
    where = ["--output", str(copied / "output"), "--run-id", "folds", "--device", "cpu"]
    small = ["--width", "16", "--hidden", "16", "--components", "8", "--neighbours", "8", "--epochs", "2"]
    assert train.main(["--data", str(copied / "data"), *where, *small, "--folds", "2"]) == 0
    assert ablation.main(where) == 0
    found = json.loads((copied / "output/runs/folds/metrics/ablation.json").read_text())
    assert found["everything"] == pytest.approx(RunFolder(str(copied / "output/runs/folds")).best().smape, rel=1e-5)
    assert found["rows"] == len(pd.read_csv(copied / "data/train.csv"))


def test_hiding_a_source_equals_data_that_lack_it(copied: Path) -> None:
    """Vectors of zeros count as missing. Evaluating rows with such a source gives the SMAPE without that source."""
    source = copied / "data/embeddings/train/qwen_text.parquet"
    table = pq.read_table(source).to_pandas()
    table["embedding"] = [np.zeros(DIMS["qwen_text"], np.float32)] * len(table)
    table.to_parquet(source)
    where = ["--output", str(copied / "output"), "--data", str(copied / "data"), "--run-id", "r", "--other-data"]
    assert evaluate_by_groups.main(where) == 0
    summary = json.loads((copied / "output/runs/r/metrics/summary.json").read_text())
    without = next(one for one in record(copied)["sources"] if one["role"] == "qwen_text")
    assert summary["smape"] == pytest.approx(without["without"], rel=1e-6)
    rows = pd.read_parquet(copied / "output/runs/r/metrics/predictions.parquet").set_index("sample_id")
    split = pd.read_parquet(copied / "output/runs/r/split.parquet").set_index("sample_id")
    before = pd.read_parquet(Path(RunFolder(str(copied / "output/runs/r")).best().url, "validation.parquet")).set_index(
        "sample_id"
    )
    errors = [row_smape(one["price"], one["predicted"]) for one in (rows, before.loc[rows.index])]
    lost = clustered_mean(errors[0] - errors[1], split["group"].loc[rows.index].to_numpy())
    assert without["lost"] == pytest.approx({k: getattr(lost, k) for k in ("mean", "error", "low", "high")}, abs=1e-5)


def test_two_ranks_give_the_same_result(copied: Path) -> None:
    before = record(copied)
    (copied / "output/runs/r/metrics/ablation.json").unlink()
    flags = ["--run-id", "r", "--output", str(copied / "output"), "--data", str(copied / "data"), "--device", "cpu"]
    done = run_command("fusion.ablation", *flags, ranks=2)
    assert done.code == 0, done.err
    after = record(copied)
    assert after["sets"] == pytest.approx(before["sets"], rel=1e-6) and done.out.count("95% interval") == 1


def test_the_table_fits_into_100_columns(made: Path, capsys: Capture) -> None:
    assert ablation.main(["--run-dir", str(made / "output/runs/r"), "--data", str(made / "data")]) == 0
    said = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 100
    assert "the Shapley values add up to" in said and all(role in said for role in ROLES)


def test_verify_finds_every_change(copied: Path) -> None:
    assert wrong(copied / "output") == []
    tried = {
        name: mutation
        for name, mutation in mutations(copied / "output")
        if all(path.name == "ablation.json" for path in mutation)
    }
    missed = {name for name, mutation in tried.items() if not is_found(mutation, copied / "output")}
    assert missed == {"runs/r/metrics/ablation.json: removed"}, "without the file, there was no ablation"
    assert len(tried) > 50


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (
            [],
            78,
            "error: neither --run-id nor --run-dir is given\nhint: name a run with --run-id; `python jobs/pull.py",
        ),
        (["--run-id", "x"], 65, "error: no run x under"),
        (["--run-dir", "{output}"], 65, "has no run.json: it is not the folder of a run"),
        (["--run-id", "r", "--data", "nowhere"], 65, "neither nowhere/train.csv nor train.parquet exists"),
    ],
)
def test_runs_and_data_that_do_not_exist_are_refused(
    flags: list[str], code: int, said: str, made: Path, capsys: Capture
) -> None:
    output = str(made / "output")
    given = [flag.replace("{output}", output) for flag in flags]
    assert ablation.main(["--output", output, *given]) == code
    assert said in capsys.readouterr().err


def test_other_data_are_refused(copied: Path, capsys: Capture) -> None:
    table = pd.read_csv(copied / "data/train.csv", dtype="str")
    table["price"] = "9.99"
    table.to_csv(copied / "data/train.csv", index=False)
    flags = ["--run-id", "r", "--output", str(copied / "output"), "--data", str(copied / "data")]
    assert ablation.main(flags) == 65
    assert "use --other-data" in capsys.readouterr().err
    assert ablation.main([*flags, "--other-data"]) == 0
    assert record(copied)["as_trained"] is False and "with other prices or embeddings" in capsys.readouterr().out
