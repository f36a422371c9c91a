"""The number of ranks or threads does not change the result, even if it does not divide the 1,003 rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion import storage
from fusion.demo.catalog import generate
from fusion.records import pointers
from fusion.records.schemas import SubmissionPointer
from tests.conftest import DIMS, SMALL
from tests.forked import run_commands

SETUPS = {"1 rank": (1, 1), "2 ranks": (2, 1), "3 ranks": (3, 1), "2 threads": (1, 2)}  # ranks, threads per rank
OTHERS = list(SETUPS)[1:]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate(folder, n_products=1203, n_test=200, dims=DIMS)
    assert len(pd.read_csv(folder / "train.csv")) == 1003
    return folder


@pytest.fixture(scope="module", params=["best", "published"])
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def outputs(data: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folders of the same run, with dropout, trained, evaluated and predicted with each setup."""
    flags = [*SMALL, "--lr", "0.001", "--epochs", "2", "--run-id", "r", "--recipe", recipe]
    commands = ["train", "--data", str(data), *flags], ["evaluate_by_groups"], ["predict_test"]
    outputs = {setup: tmp_path_factory.mktemp(setup.replace(" ", "-")) for setup in SETUPS}
    for setup, (ranks, threads) in SETUPS.items():
        where = ["--output", str(outputs[setup])]
        lines = [[f"fusion.all_embeddings.{name}", *where, *others] for name, *others in commands]
        done = run_commands(ranks, lines, env={"OMP_NUM_THREADS": str(threads)})
        assert done.returncode == 0, done.stderr
    return outputs


def curve(output: Path) -> pd.DataFrame:
    return pd.read_csv(output / "runs/r/metrics/epochs.csv")[["step", "loss", "smape"]]


def validation(output: Path) -> pd.Series:
    table = pd.read_parquet(output / "runs/r/metrics/predictions.parquet")
    return table.set_index("sample_id")["predicted"]


def submitted(output: Path) -> pd.DataFrame:
    current = pointers.read(SubmissionPointer, str(output), "submissions", "test", "current")
    assert current is not None
    lines = storage.read(f"{output}/submissions/{current.submission}/submission.csv").decode().splitlines()
    return pd.DataFrame([line.split(",") for line in lines[1:]], columns=["sample_id", "price"])


@pytest.mark.parametrize("setup", OTHERS)
def test_the_loss_curve_is_the_same(outputs: dict[str, Path], setup: str) -> None:
    np.testing.assert_allclose(curve(outputs[setup]), curve(outputs["1 rank"]), rtol=1e-5)
    pd.testing.assert_series_equal(validation(outputs[setup]), validation(outputs["1 rank"]), rtol=1e-6)


@pytest.mark.parametrize("setup", SETUPS)
def test_every_id_is_there_once_and_in_order(outputs: dict[str, Path], data: Path, setup: str) -> None:
    wanted = pd.read_csv(data / "test.csv", dtype="str")["sample_id"].tolist()
    assert submitted(outputs[setup])["sample_id"].tolist() == wanted
    split = pd.read_parquet(outputs[setup] / "runs/r/split.parquet")
    assert validation(outputs[setup]).index.tolist() == split.query("side == 'validation'")["sample_id"].tolist()


@pytest.mark.parametrize("setup", OTHERS)
def test_the_memory_is_the_same(outputs: dict[str, Path], recipe: str, setup: str) -> None:
    memories = [outputs[one] / "runs/r/memory.safetensors" for one in ("1 rank", setup)]
    if recipe == "published":
        assert not any(memory.exists() for memory in memories)
    else:
        assert memories[0].read_bytes() == memories[1].read_bytes()
