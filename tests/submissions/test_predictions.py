"""`predictions.parquet` of a submission: its columns, its rows, and how it is published."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from fusion.all_embeddings import predict_test, train
from fusion.nn.batch import Batch
from fusion.nn.price_model import PriceModel
from fusion.prediction import predict
from fusion.prediction.resumable import Compute
from fusion.records import manifests, pointers
from fusion.records.schemas import SubmissionPointer
from fusion.submissions import predictions, submission
from fusion.submissions.submission import plain
from fusion.verify.__main__ import verify
from tests.conftest import SMALL
from tests.documents import edit


@pytest.fixture(scope="module")
def output(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("predictions")
    flags = ["--data", str(catalog), "--output", str(output), "--run-id", "r", *SMALL, "--epochs", "1"]
    assert train.main(flags) == 0
    return output


def published(output: Path, name: str, *flags: str) -> Path:
    where = ["--output", str(output), "--device", "cpu", "--name", name, *flags]
    assert predict_test.main([*where, "--date", "2026-01-02"]) == 0
    return current(output, name)


def current(output: Path, name: str) -> Path:
    pointer = pointers.read(SubmissionPointer, str(output), "submissions", name, "current")
    assert pointer is not None
    return output / "submissions" / pointer.submission


def each(rows: pd.DataFrame, name: str, change: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    return {name: [change(np.array(values)) for values in rows[name]]}


HARMED: dict[str, Callable[[pd.DataFrame], dict[str, Any]]] = {
    "twice": lambda rows: each(rows, "comparable_ids", lambda ids: [ids[0], *ids[:-1]]),
    "rising": lambda rows: each(rows, "comparable_weights", lambda weights: weights[::-1]),
    "heavy": lambda rows: each(rows, "comparable_weights", lambda weights: weights + 0.3),
    "negative": lambda rows: each(rows, "comparable_weights", lambda weights: weights - 0.5),
    "free": lambda rows: each(rows, "comparable_prices", lambda prices: prices * 0),
    "ragged": lambda rows: {"comparable_ids": [ids[: 3 + row % 2] for row, ids in enumerate(rows["comparable_ids"])]},
    "lists": lambda rows: {},
}


def wrong(folder: Path) -> list[str]:
    return [str(finding) for finding in verify(str(folder)) if finding.verdict == "BAD"]


def test_rows_and_their_order_match_the_csv(output: Path) -> None:
    folder = published(output, "plain")
    csv = pd.read_csv(folder / "submission.csv", dtype="str")
    rows = predictions.from_parquet((folder / "predictions.parquet").read_bytes())
    assert rows["sample_id"].tolist() == csv["sample_id"].tolist() != sorted(csv["sample_id"])
    assert [plain(price) for price in rows["price"]] == csv["price"].tolist()
    assert wrong(folder) == []


def test_all_columns_that_the_model_computes_are_published(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pricing = predict.pricing

    def with_neighbours(model: PriceModel) -> Compute:
        compute = pricing(model)

        def more(batch: Batch) -> dict[str, Tensor]:
            price = compute(batch)["price"]
            return {"price": price, "spread": price / 2, "neighbours": torch.stack([price, price + 1], 1).long()}

        return more

    monkeypatch.setattr(predict, "pricing", with_neighbours)
    folder = published(output, "more", "--force")
    rows = pd.read_parquet(folder / "predictions.parquet")
    np.testing.assert_allclose(rows["spread"], rows["price"] / 2)
    assert [list(one) for one in rows["neighbours"]] == [[int(price), int(price + 1)] for price in rows["price"]]
    assert wrong(folder) == []


def test_an_unchanged_night_copies_the_predictions(output: Path) -> None:
    first = published(output, "nights")
    assert predict_test.main(["--output", str(output), "--name", "nights", "--date", "2026-01-03"]) == 0
    again = current(output, "nights")
    assert again.parent.name == "2026-01-03" and wrong(again) == []
    assert (again / "predictions.parquet").read_bytes() == (first / "predictions.parquet").read_bytes()


def test_lost_predictions_are_left_out_of_an_unchanged_night(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (published(output, "lost") / "predictions.parquet").unlink()
    assert predict_test.main(["--output", str(output), "--name", "lost", "--date", "2026-01-03"]) == 0
    assert "event=submission_damaged" in capsys.readouterr().err
    assert current(output, "lost").parent.name == "2026-01-03" and wrong(current(output, "lost")) == []


@pytest.mark.parametrize("change", ["price", "order", "column", "bounds", "bound", *HARMED])
def test_verify_finds_rows_that_differ_from_the_csv(change: str, output: Path) -> None:
    folder = published(output, change)
    path = folder / "predictions.parquet"
    rows = pd.read_parquet(path)
    if change == "price":
        rows.loc[0, "price"] += 0.001
    changed = {"price": rows, "order": rows.iloc[::-1], "column": rows.drop(columns="sample_id")}
    changed |= {"bounds": rows.assign(low_80=rows["high_80"]), "bound": rows.drop(columns="high_90")}
    changed |= {name: rows.assign(**harm(rows)) for name, harm in HARMED.items()}
    changed["lists"] = rows.drop(columns="comparable_prices")
    changed[change].to_parquet(path, index=False)
    files = {name: (folder / name).read_bytes() for name in ("submission.csv", path.name, "fingerprints.parquet")}
    edit(folder / "MANIFEST.json", files=[vars(entry) for entry in manifests.entries(files)])
    (line,) = wrong(folder)
    assert line.startswith("BAD  predictions.parquet: expected ")


def test_differences_below_the_digits_of_the_csv_keep_the_published_files(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two jobs at once on different processors, which round differently, the first one counts."""
    folder = published(output, "digits")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pricing = predict.pricing

    def otherwise(model: PriceModel) -> Compute:
        compute = pricing(model)

        def moved(batch: Batch) -> dict[str, Tensor]:
            computed = dict(compute(batch))
            return {**computed, "price": computed["price"] * (1 + 1e-12)}

        return moved

    monkeypatch.setattr(predict, "pricing", otherwise)
    monkeypatch.setattr(submission, "reuse", lambda *_: None)
    monkeypatch.setattr(predict, "republish", lambda *_: None)
    assert published(output, "digits") == folder and wrong(folder) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_row_groups_hold_lists_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "ROWS_PER_GROUP", 2)
    ids = pd.Index(["a", "b", "c"])
    columns = {"price": np.array([1.0, 2.0, 3.0]), "weights": np.arange(6.0).reshape(3, 2), "none": np.empty((3, 0))}

    def rows_of(part: slice) -> dict[str, Any]:
        return {"sample_id": ids[part]} | {name: values[part] for name, values in columns.items()}

    data = predictions.to_parquet(3, rows_of)
    assert data == predictions.to_parquet(3, rows_of)
    assert pq.ParquetFile(io.BytesIO(data)).num_row_groups == 2
    rows = predictions.from_parquet(data)
    assert [list(one) for one in rows["weights"]] == [[0, 1], [2, 3], [4, 5]]
    assert rows["sample_id"].tolist() == ["a", "b", "c"] and [len(one) for one in rows["none"]] == [0, 0, 0]


def test_the_size_of_row_groups_does_not_change_the_rows(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pd.read_parquet(published(output, "whole") / "predictions.parquet")
    monkeypatch.setattr(predictions, "ROWS_PER_GROUP", 7)
    path = published(output, "groups") / "predictions.parquet"
    assert pq.ParquetFile(path).num_row_groups > 10
    pd.testing.assert_frame_equal(pd.read_parquet(path), whole, check_exact=True)
