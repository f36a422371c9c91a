"""Each checkpoint has the predictions of its weights for the validation rows, also after a stop and a resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from fusion.all_embeddings import evaluate_by_groups, train
from fusion.errors import DataError
from fusion.metrics import compute_smape
from fusion.records import checkpoint, manifests
from fusion.records.run import RunFolder
from fusion.records.validation import from_parquet, has_validation, to_parquet, validation_of
from tests.conftest import SMALL
from tests.documents import edit


@pytest.fixture(scope="module")
def run(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose last epoch is not its best, with all of its checkpoints."""
    output = tmp_path_factory.mktemp("validation")
    flags = [
        "--data",
        str(catalog),
        "--output",
        str(output),
        "--run-id",
        "r",
        *SMALL,
        "--lr",
        "0.1",
        "--recipe",
        "published",
    ]
    assert train.main([*flags, "--epochs", "6", "--checkpoint-steps", "3", "--keep", "99"]) == 0
    assert evaluate_by_groups.main(["--output", str(output), "--run-id", "r", "--device", "cpu"]) == 0
    return output / "runs/r"


def test_each_validated_checkpoint_has_the_predictions_of_its_weights(run: Path) -> None:
    found = RunFolder(str(run)).checkpoints()
    history = [json.loads(line)["smape"] for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    assert min(history) < history[-1], "the last epoch is not the best"
    for made in found:
        assert has_validation(made) == (made.manifest.smape is not None)
        if has_validation(made):
            rows = validation_of(made)
            assert compute_smape(rows["price"], rows["predicted"]) == made.manifest.smape
    assert not has_validation(found[0]), "before the first validation"


def test_an_evaluation_finds_the_same_prices(run: Path) -> None:
    ours = validation_of(RunFolder(str(run)).best()).drop(columns=["category", "spread"], errors="ignore")
    theirs = pd.read_parquet(run / "metrics/predictions.parquet")[list(ours)]
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-6)
    assert ours["sample_id"].is_monotonic_increasing


def test_the_same_rows_give_the_same_bytes(run: Path) -> None:
    rows = validation_of(RunFolder(str(run)).best())
    assert to_parquet(rows) == to_parquet(from_parquet(to_parquet(rows)))


def test_the_error_for_a_checkpoint_of_an_earlier_version(run: Path, tmp_path: Path) -> None:
    made = RunFolder(str(run)).best()
    files = [entry for entry in made.manifest.files if entry.key != manifests.VALIDATION]
    earlier = manifests.Checkpoint(made.url, dataclasses.replace(made.manifest, files=files))
    with pytest.raises(DataError, match=r"has no validation\.parquet") as caught:
        validation_of(earlier)
    assert "--run-id" in caught.value.remedy


def test_a_file_without_valid_rows_is_damaged(run: Path, tmp_path: Path) -> None:
    for content in (b"", b"PAR1", to_parquet(pd.DataFrame({"sample_id": ["a"]}))):
        with pytest.raises(ValueError, match=r"."):
            from_parquet(content)


def test_a_run_resumes_from_a_checkpoint_of_an_earlier_version(run: Path) -> None:
    found = checkpoint.newest(RunFolder(str(run)))
    assert found is not None and found[2]["validated"] is not None
    folder = Path(found[0].url)
    files = [dataclasses.asdict(entry) for entry in found[0].manifest.files if entry.key != manifests.VALIDATION]
    edit(folder / "MANIFEST.json", files=files)
    again = checkpoint.newest(RunFolder(str(run)))
    assert again is not None and again[0].url == found[0].url and again[2]["validated"] is None
