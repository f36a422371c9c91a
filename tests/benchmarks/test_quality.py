"""The quality benchmark does not leak: its folds, the inputs of peers, the blend, and the predictions of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality import predictions
from benchmarks.quality.blend import nested_blend
from benchmarks.quality.catalog import Catalog, read_catalog
from benchmarks.quality.fold import log_smape, open_fold
from benchmarks.quality.inputs import VARIANTS, Inputs, Shared
from benchmarks.quality.peers import PEERS
from benchmarks.quality.runs import read_runs
from fusion.config import RunConfig
from fusion.errors import DataError, ExitCode
from fusion.qwen_clip import train

SOURCES = {"clip_image": "images", "qwen_text": "texts"}
CPU = torch.device("cpu")
MEASURED = [name for name, peer in PEERS.items() if peer.version()]


@pytest.fixture(scope="module")
def catalog(data: Path) -> Catalog:
    return read_catalog(RunConfig(data=str(data), folds=5), SOURCES, with_text=True)


def repriced(catalog: Catalog, rows: np.ndarray) -> Catalog:
    """With other prices in these rows, within the range of all prices."""
    prices = catalog.prices.copy()
    prices[rows] = np.median(prices) ** 2 / prices[rows]
    return replace(catalog, prices=prices)


@pytest.fixture(scope="module")
def output(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each of 5 folds, and one of all of them, of one epoch."""
    folder = tmp_path_factory.mktemp("output")
    given = ["--data", str(data), "--output", str(folder), "--folds", "5", "--device", "cpu", "--epochs", "1"]
    given += ["--sources.clip-image", "images", "--sources.qwen-text", "texts"]
    given += ["--model", "concat", "--width", "8", "--hidden", "8"]
    assert train.main([*given, "--run-id", "all"]) == ExitCode.DONE
    for fold in map(str, range(5)):
        assert train.main([*given, "--run-id", f"f{fold}", "--fold", fold]) == ExitCode.DONE
    return folder


def test_a_fold_is_what_the_training_of_this_fold_validates_on(catalog: Catalog, output: Path) -> None:
    for fold in range(5):
        split = pd.read_parquet(output / f"runs/f{fold}/split.parquet")
        assert list(split.loc[split["side"] == "validation", "sample_id"]) == list(catalog.ids[catalog.folds == fold])
    assert list(pd.read_parquet(output / "runs/all/split.parquet")["fold"]) == list(catalog.folds)


def test_every_row_is_in_one_fold_and_near_duplicates_are_in_the_same(catalog: Catalog) -> None:
    assert set(catalog.folds) == set(range(5))
    assert len(np.unique(catalog.groups)) == 160
    assert pd.Series(catalog.folds).groupby(catalog.groups).nunique().max() == 1


def test_settings_are_tuned_on_whole_groups_of_the_training_rows(catalog: Catalog) -> None:
    fold = open_fold(catalog, 1)
    assert not set(fold.train) & set(fold.held)
    assert not set(fold.groups[fold.tunes]) & set(fold.groups[~fold.tunes])
    assert 0.1 < fold.tunes.mean() < 0.3


@pytest.mark.filterwarnings("ignore")  # of what other libraries import
@pytest.mark.parametrize("name", MEASURED)
def test_no_peer_sees_the_prices_that_it_is_measured_on(name: str, catalog: Catalog) -> None:
    peer = PEERS[name]
    variant = peer.variants[-1]
    honest, changed = (
        peer.learn(Inputs(Shared(open_fold(one, 3), CPU), variant), quick(name))
        for one in (catalog, repriced(catalog, np.flatnonzero(catalog.folds == 3)))
    )
    np.testing.assert_array_equal(honest, changed)


@pytest.mark.parametrize("name", ["kernel", "nearest", "ridge", "mlp"])
def test_peers_learn_prices_but_not_random_ones(name: str, catalog: Catalog) -> None:
    shuffled = replace(catalog, prices=np.random.default_rng(0).permutation(catalog.prices))
    real, random = (
        np.mean(
            [log_smape(*predicted(name, one, fold)) - log_smape(*predicted("median", one, fold)) for fold in (0, 1)]
        )
        for one in (catalog, shuffled)
    )
    assert real < -15
    assert random > -5


def predicted(name: str, catalog: Catalog, number: int) -> tuple[np.ndarray, np.ndarray]:
    fold = open_fold(catalog, number)
    return PEERS[name].learn(Inputs(Shared(fold, CPU), VARIANTS[1]), quick(name)), catalog.logs[fold.held]


def quick(name: str) -> dict[str, object]:
    few = {"rounds": 10, "epochs": 5, "n_epochs": 2, "k": 4, "d_block": 16, "patience": 3}
    few |= {"k": (3, 5)} if name == "nearest" else {}
    few |= {"epochs": 40, "learning_rate_init": 0.01} if name == "mlp" else {}
    return {key: few.get(key, value) for key, value in PEERS[name].settings.items()}


def test_neighbour_features_of_a_training_row_exclude_its_group(catalog: Catalog) -> None:
    fold = open_fold(catalog, 0)
    twins = np.flatnonzero(np.bincount(catalog.groups)[catalog.groups] > 1)
    group = catalog.groups[np.intersect1d(twins, fold.train)[0]]
    mine = np.flatnonzero(catalog.groups == group)
    other = open_fold(repriced(catalog, mine), 0)
    weights = torch.full((2,), 3.0)
    before, after = (Shared(one, CPU).kernel(False).features(weights) for one in (fold, other))
    np.testing.assert_array_equal(before[mine], after[mine])
    assert not np.array_equal(before, after)


def test_blend_weights_of_a_fold_do_not_depend_on_its_prices() -> None:
    rng = np.random.default_rng(0)
    targets, folds = rng.standard_normal(300), np.arange(300) % 3
    logs = targets + rng.standard_normal((3, 300)) * np.array([[0.3], [0.6], [2.0]])
    blended, weights = nested_blend(logs, targets, folds)
    changed, _ = nested_blend(logs, np.where(folds == 1, -targets, targets), folds)
    np.testing.assert_array_equal(blended[folds == 1], changed[folds == 1])
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    assert log_smape(blended, targets) < log_smape(logs[0], targets)


def test_the_command_measures_only_what_is_new(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--data", str(data), "--sources", "clip_image=images", "qwen_text=texts", "--cache", str(tmp_path)]
    assert command.main([*given, "--models", "median", "ridge", "--only-folds", "0", "1"]) == ExitCode.DONE
    assert "on 80 rows" in capsys.readouterr().out
    assert command.main([*given, "--models", "median"]) == ExitCode.DONE
    assert command.main([*given, "--models", "median", "ridge", "--only-folds"]) == ExitCode.DONE
    reference = next(line for line in capsys.readouterr().out.splitlines()[::-1] if "| reference |" in line)
    assert "| median |" in reference, "it covers all rows"
    written = []
    monkeypatch.setattr(predictions.Cache, "write", noted(predictions.Cache.write, written))
    assert command.main([*given, "--models", "median", "ridge", "kernel", "--neighbours", "--text"]) == ExitCode.DONE
    assert "median" not in written
    assert written.count("kernel") == 2 * 5
    assert written.count("ridge") == 4 * 5 - 2
    found = json.loads((tmp_path / "table.json").read_text())
    smapes = {(one["name"], one["inputs"]): one["smape"]["mean"] for one in found["models"]}
    assert found["groups"] == 160
    assert smapes["ridge", "embeddings + text + neighbours"] < smapes["median", "prices"] - 15
    assert smapes["best convex blend", "all of the peers"] < smapes["median", "prices"] - 15
    assert "| reference |" in capsys.readouterr().out


def noted(real, written: list[str]):  # type: ignore[no-untyped-def]
    def write(self, file, *rest) -> None:  # type: ignore[no-untyped-def]
        written.append(file.parent.name.split("-")[0])
        real(self, file, *rest)

    return write


def test_a_damaged_prediction_is_named_with_what_to_do(data: Path, tmp_path: Path) -> None:
    catalog = read_catalog(RunConfig(data=str(data), folds=5), SOURCES, with_text=False)
    cache = predictions.Cache(tmp_path, catalog)
    file = cache.file("median", PEERS["median"], VARIANTS[0], 0)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"torn")
    with pytest.raises(DataError, match=r"0\.parquet is damaged"):
        predictions.gathered(cache, "median", PEERS["median"], VARIANTS[0])


def test_runs_of_all_folds_are_one_prediction_of_all_rows(catalog: Catalog, output: Path) -> None:
    (found,) = read_runs([f"f{fold}" for fold in range(5)], str(output), catalog)
    assert (found.name, found.is_ours, found.covered.all()) == ("f0 (5 folds)", True, True)
    (at_once,) = read_runs(["all"], str(output), catalog)
    assert at_once.covered.all()
    (second,) = read_runs([str(output / "runs" / "f1")], str(output), catalog)
    assert (second.covered == (catalog.folds == 1)).all()
    np.testing.assert_array_equal(found.logs[second.covered], second.logs[second.covered])
    smape = json.loads(next((output / "runs/f1/checkpoints").glob("*/MANIFEST.json")).read_text())["smape"]
    assert log_smape(second.logs[second.covered], catalog.logs[second.covered]) == pytest.approx(smape)


def test_rejects_a_run_on_other_data(catalog: Catalog, output: Path) -> None:
    with pytest.raises(DataError, match=r"two of the runs .* are of the same fold of one recipe"):
        read_runs(["f0", "f0"], str(output), catalog)
    with pytest.raises(DataError, match="other prices"):
        read_runs(["f0"], str(output), replace(catalog, prices=catalog.prices * 2))
    with pytest.raises(DataError, match="not in train"):
        read_runs(["f0"], str(output), replace(catalog, ids=catalog.ids + "x"))


def test_runs_and_peers_are_in_one_table(
    data: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(data), "--sources", "clip_image=images", "qwen_text=texts", "--cache", str(tmp_path)]
    given += ["--models", "median", "ridge", "--output", str(output), "--runs", *(f"f{fold}" for fold in range(5))]
    assert command.main(given) == ExitCode.DONE
    models = {one["name"]: one for one in json.loads((tmp_path / "table.json").read_text())["models"]}
    assert models["f0 (5 folds)"]["difference"] is None
    assert models["ridge"]["difference"]["mean"] == pytest.approx(
        models["ridge"]["smape"]["mean"] - models["f0 (5 folds)"]["smape"]["mean"]
    )
    assert "| reference |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--models", "oracle"], ExitCode.USAGE, "invalid choice: 'oracle'"),
        (["--folds", "1"], ExitCode.CONFIG, "--folds is 1"),
        (["--only-folds", "5"], ExitCode.CONFIG, "--only-folds names 5, expected 0..4"),
        (["--sources", "clip_image="], ExitCode.USAGE, "expected ROLE=NAME"),
        (["--sources", "clip_image=image"], ExitCode.DATA, "did you mean images?"),
        (["--max-missing", "3"], ExitCode.CONFIG, "--max-missing is 3"),
        (
            ["--models", "median", "--only-folds", "0", "--reference", "ridge"],
            ExitCode.CONFIG,
            "--reference is 'ridge'",
        ),
        (["--models", "median", "--only-folds"], ExitCode.DATA, "has no predictions of these peers"),
        (["--runs", "nowhere"], ExitCode.DATA, "no run nowhere"),
    ],
)
def test_reports_what_cannot_be_measured(
    given: list[str], code: int, said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(data), "--sources", "clip_image=images", "--cache", str(tmp_path)]
    assert command.main([*common, *given]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "hint: " in error
