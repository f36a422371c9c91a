"""`--shard-rows`: nodes that each hold some of the rows train, stop and go on, and are evaluated as other runs are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from fusion.records import manifests
from fusion.records.run import RunFolder
from fusion.verify import __main__ as verify
from tests.conftest import SMALL
from tests.forked import run_commands

RECIPES = {"best": ["--folds", "2"], "published": ["--recipe", "published", "--precision", "fp32"]}


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def trained(
    catalog: Path, output: Path, recipe: str, n_nodes: int, per_node: int = 1, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    flags = ["--data", str(catalog), "--output", str(output), "--run-id", "r", *SMALL, "--epochs", "3"]
    flags += ["--checkpoint-steps", "2", "--shuffle", "blocks", *RECIPES[recipe]]
    flags += ["--shard-rows"] if n_nodes else []
    local = {"FUSION_TEST_RANKS_PER_NODE": str(per_node)}
    done = run_commands(max(1, n_nodes) * per_node, [["tests.small_blocks", *flags]], env=local | dict(env or {}))
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def outputs(catalog: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folders of the same run on one node without the flag, and on two nodes of one and of two ranks."""
    found = {}
    for name, n_nodes, per_node in (("whole", 0, 1), ("nodes", 2, 1), ("ranks", 2, 2)):
        found[name] = tmp_path_factory.mktemp(name)
        code, said = trained(catalog, found[name], recipe, n_nodes, per_node)
        assert code == 0, said
    return found


def best(output: Path) -> manifests.Checkpoint:
    return RunFolder(str(output / "runs/r")).best()


def curve(output: Path) -> pd.DataFrame:
    return pd.read_csv(output / "runs/r/metrics/epochs.csv")[["step", "loss", "smape"]]


def facts(output: Path) -> dict[str, object]:
    return dict(json.loads((output / "runs/r/run.json").read_text()))


def test_the_digests_of_the_data_are_those_of_a_node_with_all_rows(outputs: dict[str, Path]) -> None:
    whole = outputs["whole"]
    for one in (outputs["nodes"], outputs["ranks"]):
        assert facts(one)["data_sha256"] == facts(whole)["data_sha256"]
        assert best(one).manifest.validation_sha256 == best(whole).manifest.validation_sha256
        assert best(one).manifest.agreement == pytest.approx(best(whole).manifest.agreement)
        assert best(one).manifest.split_sha256 == best(whole).manifest.split_sha256
        assert verify.main([str(one)]) == 0
    assert facts(outputs["nodes"])["n_nodes"] == 2 and "n_nodes" not in facts(whole)


def test_every_node_knows_the_keys_of_all_rows(outputs: dict[str, Path], recipe: str) -> None:
    files = [output / "runs/r/memory.safetensors" for output in outputs.values()]
    if recipe == "published":
        assert not any(file.exists() for file in files)
        return
    whole, nodes, ranks = (load_file(file) for file in files)
    assert files[1].read_bytes() == files[2].read_bytes()
    np.testing.assert_allclose(nodes["keys"].astype("f4"), whole["keys"].astype("f4"), atol=2e-3)
    assert ranks.keys() == whole.keys()


def test_the_result_depends_on_the_nodes_and_not_on_their_ranks(outputs: dict[str, Path]) -> None:
    pd.testing.assert_frame_equal(curve(outputs["ranks"]), curve(outputs["nodes"]), rtol=1e-5)
    assert curve(outputs["whole"])["smape"].to_numpy() == pytest.approx(curve(outputs["nodes"])["smape"], rel=0.2)
    assert not curve(outputs["whole"]).equals(curve(outputs["nodes"]))


def test_such_a_run_is_evaluated_and_predicts(outputs: dict[str, Path]) -> None:
    where = ["--output", str(outputs["nodes"])]
    lines = [["fusion.all_embeddings.evaluate_by_groups", *where], ["fusion.all_embeddings.predict_test", *where]]
    done = run_commands(1, lines)
    assert done.returncode == 0, done.stderr
    summary = json.loads((outputs["nodes"] / "runs/r/metrics/summary.json").read_text())
    assert summary["smape"] == pytest.approx(best(outputs["nodes"]).smape, rel=1e-5)


def test_a_stopped_run_goes_on_only_on_as_many_nodes(
    catalog: Path, recipe: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    code, said = trained(catalog, tmp_path, recipe, 2, env={"FUSION_TEST_STOP_AT": "11"})
    assert code == 75 and "step 11" not in said.splitlines()[0], said
    for n_nodes in (1, 3):
        code, said = trained(catalog, tmp_path, recipe, n_nodes)
        assert code == 78 and f"divides its rows between 2 nodes, now there are {n_nodes}" in said, said
        assert "hint: start it on 2 nodes, or train under another --run-id" in said
    code, said = trained(catalog, tmp_path, recipe, 2)
    assert code == 0 and "event=resumed" in said
    again, before = (manifests.read_file(best(output), manifests.MODEL) for output in (tmp_path, outputs["nodes"]))
    assert again == before
