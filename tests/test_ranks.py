"""The number of ranks changes the time, not the result: 1, 2 and 3 ranks, 1,003 rows, global batches of 64."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion import pointers, storage
from fusion.demo_catalog import generate
from fusion.records import SubmissionPointer
from tests.conftest import DIMS, SMALL, run_command

RANKS = (1, 2, 3)


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
def outputs(data: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run, with dropout, trained, evaluated and predicted on each number of ranks."""
    places = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in RANKS}
    for ranks, output in places.items():
        train = [
            "train",
            "--data",
            str(data),
            *SMALL,
            "--lr",
            "0.001",
            "--epochs",
            "2",
            "--run-id",
            "r",
            "--recipe",
            recipe,
        ]
        for name, *flags in (train, ["evaluate_by_groups"], ["predict_test"]):
            module = f"fusion.all_embeddings.{name}"
            if ranks == 1:
                assert import_module(module).main(["--output", str(output), *flags]) == 0
            else:
                done = run_command(module, "--output", str(output), *flags, ranks=ranks)
                assert done.code == 0, done.err
    return places


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


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_the_loss_curve_is_the_same(outputs: dict[int, Path], recipe: str, ranks: int) -> None:
    np.testing.assert_allclose(curve(outputs[ranks]), curve(outputs[1]), rtol=1e-5)
    rtol = {"published": 1e-6, "best": 3e-6}[recipe]  # with neighbours up to 1.5e-6 were seen
    pd.testing.assert_series_equal(validation(outputs[ranks]), validation(outputs[1]), rtol=rtol)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_id_once_and_in_order(outputs: dict[int, Path], data: Path, ranks: int) -> None:
    wanted = pd.read_csv(data / "test.csv", dtype="str")["sample_id"].tolist()
    assert submitted(outputs[ranks])["sample_id"].tolist() == wanted
    split = pd.read_parquet(outputs[ranks] / "runs/r/split.parquet")
    assert validation(outputs[ranks]).index.tolist() == split.query("side == 'validation'")["sample_id"].tolist()


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_the_memory_is_the_same(outputs: dict[int, Path], recipe: str, ranks: int) -> None:
    if recipe == "published":
        assert not (outputs[ranks] / "runs/r/memory.safetensors").exists()
        return
    memories = [(outputs[n] / "runs/r/memory.safetensors").read_bytes() for n in (1, ranks)]
    assert memories[0] == memories[1]
