"""The median price and ridge regression: compared with scikit-learn, over folds, ranks and nodes, and kept by the run.

scikit-learn chooses no penalty here: it gets the one that was chosen.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.preprocessing import StandardScaler

from fusion import storage
from fusion.all_embeddings import train
from fusion.data.embeddings import load
from fusion.distributed.world import join_world
from fusion.metrics import compute_smape
from fusion.records.run import RunFolder
from fusion.training import baselines, ridge
from tests.conftest import SMALL, run_command

ROLES = ("clip_image", "siglip_image", "siglip_text", "qwen_text")


def flags(catalog: Path, output: Path, *more: str) -> list[str]:
    return ["--data", str(catalog), "--output", str(output), "--run-id", "r", *SMALL, "--epochs", "1", *more]


def inputs_of(catalog: Path, ids: pd.Index, trains: np.ndarray) -> np.ndarray:
    """The standardised vectors of all sources, zeros where one is missing, and for each source whether it is."""
    with join_world("cpu") as world:
        store = load(str(catalog), "train", {role: role for role in ROLES}, ids, world, max_missing=0.5)
    parts = []
    for role, values in store.values.items():
        present = store.present[role].numpy()
        scaler = StandardScaler().fit(values.numpy()[trains & present].astype(np.float64))
        parts.append(np.where(present[:, None], scaler.transform(values.numpy().astype(np.float64)), 0.0))
    return np.hstack([*parts, *(~present.numpy()[:, None] for present in store.present.values())])


def test_ridge_regression_is_that_of_scikit_learn(catalog: Path, tmp_path: Path) -> None:
    """Without principal components, both have the same inputs, except for those that say what is missing."""
    plain = ["--components", "0", "--neighbours", "0", "--max-missing", "0.5"]
    assert train.main(flags(catalog, tmp_path, *plain)) == 0
    found = RunFolder(f"{tmp_path}/runs/r").baselines()
    assert found is not None
    median, regression = found.scores
    split = pd.read_parquet(tmp_path / "runs/r/split.parquet")
    table = pd.read_csv(catalog / "train.csv", dtype={"sample_id": str}).set_index("sample_id").loc[split["sample_id"]]
    trains, prices = (split["side"] == "train").to_numpy(), table["price"].to_numpy()
    inputs = inputs_of(catalog, table.index, trains)
    known = ~inputs[:, -4:].all(axis=1)
    model = SklearnRidge(alpha=regression.alphas[0]).fit(inputs[trains & known], np.log(prices[trains & known]))
    predicted = np.where(known, np.exp(model.predict(inputs)), np.median(prices[trains & known]))
    expected = compute_smape(prices[~trains], predicted[~trains])
    assert regression.smape == pytest.approx(expected, abs=0.01)
    constant = np.full((~trains).sum(), np.median(prices[trains]))
    assert median.smape == pytest.approx(compute_smape(prices[~trains], constant), abs=0.05)
    assert found.rows == (~trains).sum()
    assert regression.smape < median.smape
    for score in found.scores:
        assert score.low is not None and score.high is not None and score.low < score.smape < score.high


def test_fits_from_sums_as_from_all_rows() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(500, 7)).astype(np.float32) + 3
    target = inputs @ generator.normal(size=7) + generator.normal(size=500) + 2
    parts = np.arange(500) % 5 // 4
    blocks = [
        (torch.from_numpy(inputs[rows]), torch.from_numpy(target[rows]), torch.from_numpy(parts[rows]))
        for rows in (slice(0, 200), slice(200, 500))
    ]
    kept, left_out = ridge.sums_of(blocks, 7, 2)
    found = ridge.fit(kept, left_out)
    expected = SklearnRidge(alpha=found.alpha).fit(inputs, target)
    np.testing.assert_allclose(found.weights, expected.coef_, rtol=1e-4)
    np.testing.assert_allclose(
        found.predict(torch.from_numpy(inputs)).numpy(), expected.predict(inputs), rtol=1e-4, atol=1e-4
    )
    assert found.alpha <= 100  # 500 rows and 7 inputs need next to no penalty


@pytest.mark.parametrize("n_rows", [1, 2])
def test_fits_one_row(n_rows: int) -> None:
    rows = torch.ones(n_rows, 3)
    sums = ridge.sums_of([(rows, torch.full((n_rows,), 2.5), torch.zeros(n_rows))], 3, 2)
    found = ridge.fit(*sums)
    assert found.alpha == ridge.USUAL_ALPHA
    assert found.predict(rows).tolist() == pytest.approx([2.5] * n_rows)


def test_with_folds_each_row_is_predicted_without_its_fold(catalog: Path, tmp_path: Path) -> None:
    assert train.main(flags(catalog, tmp_path, "--folds", "2", "--max-missing", "0.5")) == 0
    found = RunFolder(f"{tmp_path}/runs/r").baselines()
    assert found is not None and found.rows == 503
    assert len(found.scores[1].alphas) == 2
    assert found.scores[1].smape < found.scores[0].smape


def test_any_number_of_ranks_and_nodes_finds_the_same(catalog: Path, tmp_path: Path) -> None:
    found = {}
    for name, ranks, more in [("one", 0, []), ("two", 2, []), ("divided", 2, ["--shard-rows"])]:
        command = flags(catalog, tmp_path / name, "--max-missing", "0.5", *more)
        done = run_command("fusion.all_embeddings.train", *command, ranks=ranks)
        assert done.code == 0, done.err
        document = json.loads((tmp_path / name / "runs/r/baselines.json").read_text())
        found[name] = [(score["smape"], score["alphas"]) for score in document["scores"]]
    for other in (found["two"], found["divided"]):
        for (smape, alphas), (expected, expected_alphas) in zip(other, found["one"], strict=True):
            assert smape == pytest.approx(expected, abs=1e-3)
            assert alphas == expected_alphas


def test_they_are_written_once_and_are_in_the_log(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(catalog, tmp_path, "--max-missing", "0.5")) == 0
    (last,) = [line for line in capsys.readouterr().err.splitlines() if "event=finished" in line]
    found = RunFolder(f"{tmp_path}/runs/r").baselines()
    assert found is not None
    assert f"median_price_smape={found.scores[0].smape:.6g}" in last
    assert f"ridge_regression_smape={found.scores[1].smape:.6g}" in last


@pytest.mark.parametrize("failing", ["_scores", "create"])
def test_a_failure_is_only_a_warning(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    if failing == "_scores":
        monkeypatch.setattr(baselines, "_scores", fail)
    else:
        create = storage.create
        monkeypatch.setattr(
            storage, "create", lambda url, data: fail() if url.endswith("baselines.json") else create(url, data)
        )
    assert train.main(flags(catalog, tmp_path, "--max-missing", "0.5")) == 0
    said = capsys.readouterr().err
    assert 'warning run=r rank=0/1 event=no_baselines reason="CUDA out of memory"' in said
    assert RunFolder(f"{tmp_path}/runs/r").baselines() is None
    (last,) = [line for line in said.splitlines() if "event=finished" in line]
    assert "median_price_smape" not in last


def test_sources_of_too_many_dimensions_have_no_regression(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "LARGEST_SUMS", 1000)
    assert train.main(flags(catalog, tmp_path, "--max-missing", "0.5")) == 0
    found = RunFolder(f"{tmp_path}/runs/r").baselines()
    assert found is not None and [score.name for score in found.scores] == ["median price"]
