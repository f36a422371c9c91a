"""Neighbours that lists find: nearly those of an exact search, none that it may not find, the same on any machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.config import RunConfig
from fusion.distributed.world import join_world
from fusion.errors import DataError
from fusion.metrics import compute_smape
from fusion.nn import approximate, neighbours
from fusion.nn.approximate import Index, Partition
from fusion.nn.neighbours import Memory, bands_of
from fusion.records import SubmissionPointer, memory, pointers
from fusion.records.run import RunFolder
from fusion.records.validation import validation_of
from fusion.training.memory_build import _partition
from fusion.verify.__main__ import verify
from tests.conftest import SMALL, run_command
from tests.training.test_resume import model_bytes, stopped_at
from tests.verify.test_verify import other_arrays

DIMS = {"image": 160, "text": 103}  # not a multiple of the columns of a code
WEIGHTS = torch.tensor([3.0, 1.0, 5.0, 6.0, 2.0, 6.0, 9.0, 9.0])
K = 16
N_ROWS = 4000

Capture = pytest.CaptureFixture[str]


def clustered(n_rows: int, seed: int = 0) -> Memory:
    """Rows around 100 centres, which have a price each."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.arange(n_rows) % 100
    parts = []
    for dim in DIMS.values():
        centres = torch.randn(100, dim, generator=torch.Generator().manual_seed(dim))
        parts.append(F.normalize(centres[centre] + torch.randn(n_rows, dim, generator=generator), dim=1))
    log_prices = (centre * 0.37) % 5 + 0.3 * torch.randn(n_rows, generator=generator)
    rows = torch.arange(n_rows)
    return Memory(torch.cat(parts, dim=1).half(), log_prices, rows % 3, rows // 2, bands_of(DIMS))


def listed(kept: Memory) -> Memory:
    """The same memory, with a partition."""
    with join_world("cpu") as place:
        return replace(kept, partition=_partition(RunConfig(), kept, WEIGHTS.numpy(), place))


@pytest.fixture(scope="module")
def kept() -> Memory:
    return listed(clustered(N_ROWS))


def price(kept: Memory, queries: Tensor, groups: Tensor | None = None) -> Tensor:
    """[B] log price by the softmax over similarities."""
    found = kept.search(queries, WEIGHTS, K, groups)
    assert found.usable.all()
    return ((found.similarities @ WEIGHTS).softmax(1) * found.log_prices).sum(1)


def test_nearly_the_neighbours_and_the_prices_of_an_exact_search(kept: Memory) -> None:
    exact, queries = replace(kept, partition=None), clustered(600, seed=1).keys
    wanted, found = exact.search(queries, WEIGHTS, K), kept.search(queries, WEIGHTS, K)
    hits = (wanted.rows.unsqueeze(2) == found.rows.unsqueeze(1)).any(2).double()
    weights = (wanted.similarities @ WEIGHTS).softmax(1)
    assert hits.mean() > 0.9 and (hits * weights).sum(1).mean() > 0.93
    assert hits.mean() < 1, "it is not the exact search"
    assert (price(kept, queries) - price(exact, queries)).abs().mean() < 0.03
    assert [len(set(row)) for row in found.rows.tolist()] == [K] * 600


def test_what_is_found_has_its_exact_similarities_the_largest_first(kept: Memory) -> None:
    queries = clustered(50, seed=1).keys
    found = kept.search(queries, WEIGHTS, K)
    torch.testing.assert_close(found.similarities, kept.similarities(queries, found.rows).float())
    assert (np.diff((found.similarities @ WEIGHTS).numpy(), axis=1) <= 1e-6).all()


def test_no_row_of_the_own_group_is_a_candidate(kept: Memory) -> None:
    found = kept.search(kept.keys[:500], WEIGHTS, K, kept.groups[:500])
    assert found.usable.all() and not (kept.groups[found.rows] == kept.groups[:500].unsqueeze(1)).any()


def test_rows_that_are_in_no_part_are_never_found(kept: Memory) -> None:
    found = replace(kept, folds=torch.where(kept.folds == 1, -1, kept.folds)).search(kept.keys[:500], WEIGHTS, K)
    assert found.usable.all() and set(found.folds.flatten().tolist()) == {0, 2}
    assert set(kept.without((0, 0)).search(kept.keys[:500], WEIGHTS, K).folds.flatten().tolist()) == {1, 2}
    assert not replace(kept, folds=torch.full_like(kept.folds, -1)).search(kept.keys[:9], WEIGHTS, K).usable.any()


def test_a_row_of_a_large_group_is_compared_with_all(kept: Memory) -> None:
    """Nearly all that its lists hold is of its group."""
    groups = kept.groups.clone()
    groups[torch.arange(N_ROWS) % 100 == 7] = 99_999
    kept = replace(kept, groups=groups)
    rows = torch.nonzero(groups == 99_999).squeeze(1)
    found = kept.search(kept.keys[rows], WEIGHTS, K, groups[rows])
    wanted = replace(kept, partition=None).search(kept.keys[rows], WEIGHTS, K, groups[rows])
    assert found.usable.all() and (groups[found.rows] != 99_999).all()
    assert torch.equal(found.rows.sort(1).values, wanted.rows.sort(1).values)


@pytest.mark.parametrize("n_rows", [1, 3, 5, 40])
def test_few_rows(n_rows: int) -> None:
    kept = listed(clustered(n_rows))
    found = kept.search(kept.keys, WEIGHTS, K)
    assert found.rows.shape == (n_rows, min(K, n_rows)) and found.usable.all()


def test_an_exact_search_in_blocks_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_has_bf16_tiles", lambda: False)  # of equal similarities any may be found
    kept = clustered(1000)
    whole = kept.search(kept.keys, WEIGHTS, K, kept.groups)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 300)
    parts = kept.search(kept.keys, WEIGHTS, K, kept.groups)
    assert torch.equal(whole.rows, parts.rows) and torch.equal(whole.similarities, parts.similarities)
    few = kept.of(torch.arange(302))
    assert few.search(kept.keys[:5], WEIGHTS, 302).usable.all(), "a block has fewer rows than are wanted"


def found_on(n_threads: int, kept: Memory) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        partition = listed(replace(kept, partition=None)).partition
        assert partition is not None
        index = Index(partition, kept.keys, torch.arange(len(kept)), WEIGHTS.double()[kept.bands].sqrt())
        return [*vars(partition).values(), index.rows(kept.keys, K).sort(1).values]
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing(kept: Memory) -> None:
    one, three = found_on(1, kept), found_on(3, kept)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, three, strict=True))


def flags(data: Path, output: Path, *more: str) -> list[str]:
    where = ["--data", str(data), "--output", str(output), "--run-id", "r", *SMALL, "--epochs", "4"]
    return [*where, "--neighbours", "16", "--checkpoint-steps", "3", "--approximate-above", "300", *more]


@pytest.fixture(scope="module")
def trained(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("approximate")
    assert train.main(flags(catalog, output)) == 0
    return output


def validated(output: Path) -> pd.DataFrame:
    return validation_of(RunFolder(str(output / "runs/r")).best())


def submission(output: Path, name: str) -> pd.Series:
    current = pointers.read(SubmissionPointer, str(output), "submissions", name, "current")
    assert current is not None
    return pd.read_csv(output / "submissions" / current.submission / "submission.csv", index_col=0)["price"]


def test_a_run_is_about_as_good_as_with_an_exact_search(trained: Path, catalog: Path, tmp_path: Path) -> None:
    assert train.main(flags(catalog, tmp_path, "--approximate-above", "1000")) == 0
    assert memory.read(RunFolder(str(tmp_path / "runs/r"))).memory.partition is None
    assert memory.read(RunFolder(str(trained / "runs/r"))).memory.partition is not None
    exact, found = validated(tmp_path), validated(trained)
    assert not np.array_equal(exact["predicted"], found["predicted"])
    assert (
        abs(compute_smape(exact["price"], exact["predicted"]) - compute_smape(found["price"], found["predicted"])) < 2
    )


def test_it_is_evaluated_predicted_with_and_verified(trained: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "output"))
    where = ["--output", str(output), "--run-id", "r"]
    assert evaluate_by_groups.main(where) == 0
    assert predict_test.main([*where, "--date", "2026-01-02"]) == 0
    assert [str(one) for one in verify(str(output)) if one.verdict == "BAD"] == []


def test_two_ranks_do_the_same(trained: Path, catalog: Path, tmp_path: Path) -> None:
    done = run_command("fusion.all_embeddings.train", *flags(catalog, tmp_path), ranks=2)
    assert done.code == 0, done.err
    one, two = (memory.read(RunFolder(str(place / "runs/r"))) for place in (trained, tmp_path))
    assert memory.to_bytes(one) == memory.to_bytes(two)
    np.testing.assert_allclose(validated(trained)["predicted"], validated(tmp_path)["predicted"], rtol=1e-4)


def test_a_run_that_goes_on_ends_with_the_same_bytes(
    trained: Path, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(patch, 8)
        assert train.main(flags(catalog, tmp_path)) == 75
    assert train.main(flags(catalog, tmp_path)) == 0
    assert model_bytes(tmp_path) == model_bytes(trained)


def test_without_faiss_nothing_is_trained_and_a_night_takes_longer(
    trained: Path, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    assert train.main(flags(catalog, tmp_path)) == 78
    said = capsys.readouterr().err
    assert "402 rows train, more than --approximate-above 300, and faiss" in said
    assert "hint: pip install faiss-cpu, or give --approximate-above 402 to compare each row with all" in said
    assert not (tmp_path / "runs/r/memory.safetensors").exists()
    assert train.main(flags(catalog, tmp_path, "--approximate-above", "402", "--run-id", "exact")) == 0
    output = Path(shutil.copytree(trained, tmp_path / "output"))
    where = ["--output", str(output), "--run-id", "r", "--date", "2026-01-02"]
    capsys.readouterr()
    assert predict_test.main([*where, "--name", "exact"]) == 0
    assert "event=no_faiss" in (said := capsys.readouterr().err) and "pip install faiss-cpu" in said
    monkeypatch.delitem(sys.modules, "faiss")
    assert predict_test.main([*where, "--name", "lists"]) == 0
    assert "no_faiss" not in capsys.readouterr().err
    difference = np.log(submission(output, "exact") / submission(output, "lists")).abs()
    assert 0 < difference.mean() < 0.1, "of 400 rows, where every list has four"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("partition.centroids", lambda one: one[:, 1:], "columns of the centroids: expected 44, found 43"),
        ("partition.codebook", lambda one: one[1:], "codes of a key: expected 11, found 10"),
        ("partition.lists", lambda one: one[1:], "rows in lists: expected 503, found 502"),
        ("partition.lists", lambda one: one + 100, "lists of its rows: expected numbers below 100, of centroids"),
        ("partition.codebook", lambda one: one / 0, "numbers: expected finite, found others in partition.codebook"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_lists_that_are_not_those_of_the_rows_though_their_digests_are(
    name: str, change: Callable[[np.ndarray], np.ndarray], said: str, trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained / "runs/r", tmp_path / "r"))
    other_arrays(run / "memory.safetensors", **{name: change})
    wrong = [str(one) for one in verify(str(run)) if one.verdict == "BAD"]
    assert len(wrong) == 1 and "memory.safetensors" in wrong[0] and said in wrong[0]
    with pytest.raises(DataError, match="its lists are not those of its rows"):
        memory.read(RunFolder(str(run)))


def test_a_memory_with_half_a_partition(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "runs/r", tmp_path / "r"))
    other_arrays(run / "memory.safetensors", without=("partition.lists",))
    (line,) = (str(one) for one in verify(str(run)) if one.verdict == "BAD")
    assert "found only partition.centroids and partition.codebook" in line
    with pytest.raises(DataError, match=r"memory\.safetensors is damaged"):
        memory.read(RunFolder(str(run)))


@pytest.mark.parametrize("damage", ["centroids", "lists", "codebook", "rows", "infinite"])
def test_a_partition_that_is_not_that_of_the_rows(damage: str, kept: Memory) -> None:
    made = kept.partition
    assert made is not None and approximate.fits(made, *kept.keys.shape)
    harmed: dict[str, Partition] = {
        "centroids": replace(made, centroids=made.centroids[:, 1:]),
        "lists": replace(made, lists=made.lists + len(made.centroids)),
        "codebook": replace(made, codebook=made.codebook[1:]),
        "rows": replace(made, lists=made.lists[1:]),
        "infinite": replace(made, centroids=made.centroids / 0),
    }
    assert not approximate.fits(harmed[damage], *kept.keys.shape)
