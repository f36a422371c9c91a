"""`Model.predict` gives the prices of the command `predict_test`, bit for bit, however rows and vectors are given."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fusion
from fusion.all_embeddings import predict_test as predict_all
from fusion.all_embeddings import train as train_all
from fusion.errors import ConfigError, DataError
from fusion.jobs import pull
from fusion.qwen_clip import predict_test as predict_pair
from fusion.qwen_clip import train as train_pair
from tests.conftest import SMALL, upload

COMMANDS = {"all_embeddings": (train_all, predict_all), "qwen_clip": (train_pair, predict_pair)}
# Settings of trainings that compute their prices in different ways.
RUNS = {
    "neighbours": ("all_embeddings", ["--epochs", "2"]),
    "pair": ("qwen_clip", ["--epochs", "2"]),
    "published": ("all_embeddings", ["--recipe", "published", "--epochs", "1", "--n-heads", "2"]),
    "text": ("qwen_clip", ["--epochs", "1", "--features", "text", "--columns", "category"]),
    "folds": ("all_embeddings", ["--epochs", "1", "--folds", "2"]),
}


@pytest.fixture(scope="module")
def output(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of all `RUNS`, and their submissions, each under the name of its run."""
    folder = tmp_path_factory.mktemp("output")
    where = ["--output", str(folder), "--device", "cpu"]
    for name, (variant, settings) in RUNS.items():
        train, predict = COMMANDS[variant]
        assert train.main(["--data", str(catalog), "--run-id", name, *SMALL, *where[:2], *settings]) == 0
        assert predict.main([*where, "--run-id", name, "--name", name, "--max-training-drift", "99"]) == 0
    return folder


def published(output: Path, name: str) -> pd.DataFrame:
    """The `predictions.parquet` that the command wrote."""
    (found,) = output.glob(f"submissions/{name}/*/*/predictions.parquet")
    return pd.read_parquet(found)


def frame_of(catalog: Path) -> pd.DataFrame:
    return pd.read_csv(catalog / "test.csv")


def files_of(catalog: Path, roles: Any) -> dict[str, pd.DataFrame]:
    return {role: pd.read_parquet(catalog / f"embeddings/test/{role}.parquet") for role in roles}


def arrays_of(catalog: Path, roles: Any) -> dict[str, np.ndarray]:
    """The vectors of each role in the order of `test.csv`, with NaN where there is none."""
    ids, arrays = frame_of(catalog)["sample_id"], {}
    for role, source in files_of(catalog, roles).items():
        rows = source.set_index("sample_id")["embedding"]
        dim, dtype = len(rows.iloc[0]), rows.iloc[0].dtype
        arrays[role] = np.stack([rows.get(one, np.full(dim, np.nan, dtype)) for one in ids])
    return arrays


def assert_equal(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """All columns are the same to the bit, in the same order; ids may be numbers instead of texts."""
    assert list(found.columns) == list(expected.columns)
    assert [str(one) for one in found["sample_id"]] == list(expected["sample_id"])
    for name in expected.columns[1:]:
        pairs = zip(found[name], expected[name], strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs), name


@pytest.mark.parametrize("name", RUNS)
def test_prices_are_those_of_the_command(name: str, output: Path, catalog: Path) -> None:
    model = fusion.load(output, run=name, device="cpu")
    assert_equal(model.predict(frame_of(catalog), files_of(catalog, model.sources)), published(output, name))
    assert_equal(model.predict(frame_of(catalog), arrays_of(catalog, model.sources)), published(output, name))


def as_pairs(arrays: dict[str, np.ndarray], ids: pd.Series) -> dict[str, Any]:
    """Ids and vectors in another order, without those that are missing."""
    order = np.random.default_rng(0).permutation(len(ids))
    kept = {role: order[~np.isnan(one[order]).any(1)] for role, one in arrays.items()}
    return {role: (ids.to_numpy()[rows], arrays[role][rows]) for role, rows in kept.items()}


FORMS: dict[str, Callable[[dict[str, np.ndarray], pd.Series], dict[str, Any]]] = {
    "torch": lambda arrays, _: {role: torch.from_numpy(one) for role, one in arrays.items()},
    "lists": lambda arrays, _: {
        role: [None if np.isnan(row).any() else row for row in one] for role, one in arrays.items()
    },
    "series": lambda arrays, _: {role: pd.Series(list(one)) for role, one in arrays.items()},
    "arrow": lambda arrays, _: {role: pa.array(list(one)) for role, one in arrays.items()},
    "fixed": lambda arrays, _: {
        role: pa.FixedSizeListArray.from_arrays(one.ravel(), one.shape[1]) for role, one in arrays.items()
    },
    "polars": lambda arrays, ids: {
        role: polars.DataFrame({"sample_id": ids, "embedding": list(one)}) for role, one in arrays.items()
    },
    "indexed": lambda arrays, ids: {
        role: pd.Series(list(one), pd.Index(ids, name="sample_id")).sample(frac=1, random_state=0)
        for role, one in arrays.items()
    },
    "reindexed": lambda arrays, ids: {
        role: pd.Series({key: row for key, row in zip(ids, one, strict=True) if not np.isnan(row).any()}).reindex(ids)
        for role, one in arrays.items()
    },
    "wide": lambda arrays, ids: {
        role: pd.DataFrame(one).assign(sample_id=ids).sample(frac=1, random_state=0) for role, one in arrays.items()
    },
    "zeros": lambda arrays, _: {
        role: np.where(np.isnan(one).any(1, keepdims=True), 0, one) for role, one in arrays.items()
    },
    "pairs": as_pairs,
    "mappings": lambda arrays, ids: {
        role: dict(zip(ids.astype(str), one, strict=True)) for role, one in arrays.items()
    },
    "float32": lambda arrays, _: {role: one.astype(np.float32) for role, one in arrays.items()},
    "float64": lambda arrays, _: {role: one.astype(np.float64) for role, one in arrays.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_vectors_may_have_any_form(form: str, output: Path, catalog: Path) -> None:
    model = fusion.load(output, run="neighbours", device="cpu")
    frame = frame_of(catalog)
    given = FORMS[form](arrays_of(catalog, model.sources), frame["sample_id"])
    assert_equal(model.predict(frame, given), published(output, "neighbours"))


@pytest.mark.parametrize("name", ["text", "folds"])
def test_frames_may_be_of_other_libraries(name: str, output: Path, catalog: Path) -> None:
    model = fusion.load(output, run=name, device="cpu")
    sources, expected = files_of(catalog, model.sources), published(output, name)
    for frame in (polars.read_csv(catalog / "test.csv"), pa.Table.from_pandas(frame_of(catalog))):
        assert_equal(model.predict(frame, sources), expected)


def test_rows_keep_the_order_index_and_ids_of_the_frame(output: Path, catalog: Path) -> None:
    model = fusion.load(output, run="pair", device="cpu")
    frame = frame_of(catalog).sample(frac=1, random_state=0)
    found = model.predict(frame, files_of(catalog, model.sources))
    assert found.index.equals(frame.index) and found["sample_id"].equals(frame["sample_id"])
    by_id = frame.set_index("sample_id")
    assert model.predict(by_id, files_of(catalog, model.sources))["price"].equals(found.set_index("sample_id")["price"])
    assert_equal(found.sort_index(), published(output, "pair"))


def test_a_role_that_no_row_has_is_given_as_none(output: Path, catalog: Path) -> None:
    model = fusion.load(output, run="pair", device="cpu")
    arrays = arrays_of(catalog, model.sources)
    absent = {**arrays, "clip_image": np.zeros_like(arrays["clip_image"])}
    without = model.predict(frame_of(catalog), {**arrays, "clip_image": None})
    assert_equal(without, model.predict(frame_of(catalog), absent).astype({"sample_id": str}))


def test_a_single_row_can_be_predicted(output: Path, catalog: Path) -> None:
    model = fusion.load(output, run="neighbours", device="cpu")
    arrays = {role: one[:1] for role, one in arrays_of(catalog, model.sources).items()}
    found = model.predict(frame_of(catalog).head(1), arrays)
    assert found["price"].iloc[0] == pytest.approx(published(output, "neighbours")["price"].iloc[0], rel=1e-5)


def test_a_model_knows_its_run(output: Path, catalog: Path) -> None:
    model = fusion.load(output, run="text", device="cpu")
    assert (model.run_id, model.variant, model.sources) == ("text", "qwen_clip", {"clip_image": 12, "qwen_text": 14})
    assert model.columns == ["catalog_content", "category"]
    assert model.config.epochs == 1 and model.settings()["epochs"] == 1
    assert list(model.history["epoch"]) == [1]
    assert model.metrics["smape"] == pytest.approx(model.history["smape"].iloc[0])
    assert model.metrics["smape_low"] < model.metrics["smape"] < model.metrics["smape_high"]
    assert model.metrics["count"] == len(model.validation)
    assert "text: SMAPE" in repr(model) and "clip_image [12]" in model._repr_html_()


def test_the_best_or_latest_run_of_a_variant_is_loaded(output: Path) -> None:
    best = fusion.load(output, "all_embeddings", device="cpu")
    smapes = {
        name: fusion.load(output, run=name, device="cpu").metrics["smape"] for name in ("neighbours", "published")
    }
    assert best.run_id == min(smapes, key=lambda name: smapes[name])
    assert fusion.load(output, "all_embeddings", run="latest", device="cpu").run_id == "folds"
    assert fusion.load(output / "runs" / "pair", device="cpu").run_id == "pair"
    with pytest.raises(ConfigError, match=r"runs of all_embeddings and of qwen_clip\nhint: name one: fusion.load"):
        fusion.load(output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": "neighbors"}, "no run neighbors under .*\nhint: did you mean neighbours"),
        ({"variant": "all_embedings"}, "no variant 'all_embedings'\nhint: did you mean all_embeddings"),
        ({"variant": "qwen_clip", "run": "best "}, "run_id is 'best '"),
        ({"variant": "qwen_clip", "run": "folds"}, "run folds is of all_embeddings"),
        ({"variant": "ensemble"}, "no ensemble under"),
        ({"run": "pair", "device": "tpu"}, "device is 'tpu': expected auto, cpu"),
    ],
)
def test_a_run_that_cannot_be_loaded_is_named(arguments: dict[str, str], message: str, output: Path) -> None:
    with pytest.raises(fusion.FusionError, match=message):
        fusion.load(output, **arguments)  # type: ignore[arg-type]


def test_an_empty_output_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run of any variant"):
        fusion.load(tmp_path)
    with pytest.raises(DataError, match="no finished run of qwen_clip"):
        fusion.load(tmp_path, "qwen_clip")


def _changed(arrays: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {role: one for role, one in {**arrays, **others}.items() if one is not ...}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip_image": ...}, r"sources lacks 'clip_image'.*\nhint: .*clip_image \[rows, 12\], qwen_text \[rows, 14\]"),
        ({"clip_imag": 1}, "'clip_imag' is not a role of this model\nhint: did you mean clip_image"),
        ({"clip_image": np.zeros((100, 11))}, "clip_image has 11 dimensions in sources, the model was trained with 12"),
        ({"clip_image": np.zeros((99, 12))}, "clip_image has 99 vectors, and the frame has 100 rows"),
        ({"clip_image": np.zeros(100)}, r"clip_image is an array of shape \[100\]"),
        ({"clip_image": np.full((100, 12), "a")}, "expected numbers"),
        ({"clip_image": [[1.0] * 12] * 99 + [[1.0]]}, "clip_image has vectors of 1 and of 12 numbers"),
        ({"clip_image": [None] * 100}, "clip_image has no vectors"),
        ({"clip_image": [1.0] * 100}, r"clip_image has a vector of shape \[\]"),
        ({"clip_image": pa.array([1.0] * 100)}, r"clip_image is an array of shape \[100\]"),
        ({"clip_image": "images.npy"}, "clip_image is a str, expected vectors"),
        ({"clip_image": ([1, 1], np.ones((2, 12)))}, "1 ids occur more than once in the ids of clip_image"),
        ({"clip_image": ([1.5, 1], np.ones((2, 12)))}, "is double, expected int64 or string"),
        ({"clip_image": ([1], np.ones((2, 12)))}, "clip_image has 2 vectors and 1 ids"),
    ],
)
def test_wrong_sources_are_named(given: dict[str, Any], message: str, output: Path, catalog: Path) -> None:
    model = fusion.load(output, run="pair", device="cpu")
    arrays = arrays_of(catalog, model.sources)
    with pytest.raises(DataError, match=message):
        model.predict(frame_of(catalog), _changed(arrays, **given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="sample_id"), "the frame has no column 'sample_id'"),
        (lambda frame: frame.drop(columns="catalog_content"), "has no column 'catalog_content', which the model"),
        (lambda frame: frame.assign(sample_id=1), "1 ids occur more than once in the frame"),
        (lambda frame: frame.assign(sample_id=frame["sample_id"] + 0.5), "is double, expected int64 or string"),
        (
            lambda frame: frame.assign(category=[1, *["a"] * (len(frame) - 1)]),
            "column 'category' of the frame cannot be",
        ),
        (lambda frame: frame.head(0), "the frame has no rows"),
        (lambda frame: frame["sample_id"], "the frame is a Series, expected a DataFrame"),
    ],
)
def test_wrong_frames_are_named(
    change: Callable[[pd.DataFrame], Any], message: str, output: Path, catalog: Path
) -> None:
    model = fusion.load(output, run="text", device="cpu")
    with pytest.raises(DataError, match=message):
        model.predict(change(frame_of(catalog)), arrays_of(catalog, model.sources))


def test_text_ids_are_kept(output: Path, catalog: Path) -> None:
    model = fusion.load(output, run="pair", device="cpu")
    frame = frame_of(catalog).assign(sample_id=lambda rows: rows["sample_id"].astype(str))
    found = model.predict(frame, arrays_of(catalog, model.sources))
    assert found["sample_id"].equals(frame["sample_id"])
    assert_equal(found, published(output, "pair"))


def test_blocks_of_rows_give_the_same_prices(output: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion.prediction.resumable.CHUNK", 16)
    monkeypatch.setattr("fusion.api.pricers.block_rows", lambda _: 32)
    model = fusion.load(output, run="text", device="cpu")
    blocks = model.predict(frame_of(catalog), arrays_of(catalog, model.sources))
    monkeypatch.setattr("fusion.api.pricers.block_rows", lambda _: 1024)
    whole = model.predict(frame_of(catalog), arrays_of(catalog, model.sources))
    assert_equal(blocks, whole.astype({"sample_id": str}))


def test_threads_may_predict_with_one_model(output: Path, catalog: Path) -> None:
    model = fusion.load(output, run="pair", device="cpu")
    frame, sources = frame_of(catalog), files_of(catalog, model.sources)
    with ThreadPoolExecutor(4) as pool:
        found = [one.result() for one in [pool.submit(model.predict, frame, sources) for _ in range(8)]]
    for prices in found:
        assert_equal(prices, published(output, "pair"))


def test_nothing_is_printed(output: Path, catalog: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = fusion.load(output, run="pair", device="cpu")
    model.predict(frame_of(catalog), files_of(catalog, model.sources))
    assert capfd.readouterr() == ("", "")


def test_a_model_predicts_while_its_sources_are_warned_of(
    output: Path, catalog: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = fusion.load(output, run="pair", device="cpu")
    model.predict(frame_of(catalog), {**arrays_of(catalog, model.sources), "clip_image": None})
    assert "event=missing_embeddings role=clip_image rows=100 of=100" in capfd.readouterr().err


def test_the_run_is_read_only(output: Path, catalog: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    model = fusion.load(output, run="neighbours", device="cpu")
    model.predict(frame_of(catalog), files_of(catalog, model.sources))
    assert model.metrics and len(model.history)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_parquet_tables_are_read_as_frames(output: Path, catalog: Path) -> None:
    rows = pq.read_table(catalog / "embeddings/test/clip_image.parquet")
    model = fusion.load(output, run="pair", device="cpu")
    arrays = arrays_of(catalog, model.sources)
    found = model.predict(frame_of(catalog), {**arrays, "clip_image": (rows["sample_id"], rows["embedding"])})
    assert_equal(found, published(output, "pair"))


def test_a_run_is_loaded_from_a_bucket_or_pulled_from_it(
    bucket: str, output: Path, catalog: Path, tmp_path: Path
) -> None:
    upload(output / "runs" / "text", f"{bucket}/out/runs/text")
    upload(output / "pointers", f"{bucket}/out/pointers")
    assert pull.main(["run", "text", "--output", f"{bucket}/out", "--to", str(tmp_path)]) == 0
    for place, run in ((f"{bucket}/out", "text"), (str(tmp_path / "runs" / "text"), "best")):
        model = fusion.load(place, run=run, device="cpu")
        assert_equal(model.predict(frame_of(catalog), files_of(catalog, model.sources)), published(output, "text"))
        assert model.metrics["count"] > 0 and len(model.history) == 1
    assert model.evaluate()["count"].iloc[0] == model.metrics["count"]
