"""Sources computed from the tables: what they are, what they are fitted on, and a run that uses them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.all_embeddings.config import Config
from fusion.all_embeddings.model import build_network
from fusion.command.settings import parse
from fusion.data.tables import Table, read_table
from fusion.demo.catalog import generate
from fusion.errors import ConfigError, DataError
from fusion.features.fitted import (
    Features,
    columns_of,
    fit_features,
    from_bytes,
    read_features,
    row_hashes,
    to_bytes,
    training_columns,
)
from fusion.features.terms import chars, words
from fusion.metrics import compute_smape
from fusion.records import manifests, pointers
from fusion.records.run import RunFolder
from fusion.records.schemas import RunPointer
from tests.conftest import DIMS, SMALL, run_command
from tests.features.texts import found, texts

TEXTS = [
    "Alder Tea, pack of 6\nBrand: Alder",
    "Alder Coffee, 2 lb\nBrand: Alder",
    "",
    "Farrow Tea 12 oz\nBrand: Farrow",
]
WITH_FEATURES = ["--features", "text", "--columns", "category"]


def table(**columns: list[object]) -> Table:
    frame = pd.DataFrame(columns).set_index(pd.Index([f"{row:03d}" for row in range(len(columns["price"]))]))
    return Table(frame, np.arange(len(frame)), tuple(columns))


def fitted(rows: Table, config: Config, trains: np.ndarray | None = None) -> Features:
    columns = training_columns(config, rows)
    trains = np.ones(len(rows), bool) if trains is None else trains
    return fit_features(config, columns, rows.prices, trains, lambda: None)


def test_vectors_of_a_row_depend_on_that_row_alone() -> None:
    rows = table(price=[1.0, 2, 3, 4], catalog_content=TEXTS, shop=["a", "b", "", "a"])
    config = Config(features=("text",), columns=("shop",))
    features, columns = fitted(rows, config), training_columns(config, rows)
    together = features.vectors(columns, "train.csv")
    for row in range(4):
        alone = features.vectors({name: values.take([row]) for name, values in columns.items()}, "train.csv")
        for role, (values, present) in alone.items():
            assert (values[0] == together[role][0][row]).all() and present[0] == together[role][1][row]
    assert [bool(present[2]) for _, present in together.values()] == [False] * 5, "an empty text lacks the roles"
    assert list(together) == list(features.dims)
    assert {role: values.shape[1] for role, (values, _) in together.items()} == features.dims


def test_the_vocabulary_contains_no_terms_of_validation_rows() -> None:
    rows = table(price=[1.0, 2, 3, 4], catalog_content=["red tea", "red tea", "rare word", "rare word"])
    features = fitted(rows, Config(features=("text",)), np.array([True, True, False, False]))
    rare = found(words, "rare word") | found(chars, "rare word")
    assert not rare & {int(term) for space in features.spaces for term in space.terms}
    vectors = features.vectors(training_columns(Config(features=("text",)), rows), "train.csv")
    assert vectors["text_words"][1].tolist() == [True, True, False, False]


def test_prices_change_no_feature() -> None:
    rows = table(price=[1.0, 2, 3, 4], catalog_content=TEXTS, weight=["1", "2", "30", ""])
    other = table(price=[9.0, 3, 7, 1], catalog_content=TEXTS, weight=["1", "2", "30", ""])
    config = Config(features=("text",), columns=("weight",))
    assert to_bytes(fitted(rows, config)) == to_bytes(fitted(other, config))


def test_features_can_be_serialised() -> None:
    rows = table(price=[1.0, 2, 3, 4], catalog_content=TEXTS, shop=["a", "b", "", "a"], weight=["1", "2", "3000", ""])
    config = Config(features=("text",), columns=("shop", "weight"))
    features = fitted(rows, config)
    content = to_bytes(features)
    again = from_bytes(content, "url")
    assert to_bytes(again) == content == to_bytes(fitted(rows, config))
    before, after = (one.vectors(training_columns(config, rows), "x") for one in (features, again))
    assert all((before[role][0] == after[role][0]).all() for role in before)
    only_columns = fitted(rows, Config(columns=("weight",)))
    assert from_bytes(to_bytes(only_columns), "url") == only_columns


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "features.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"features\.safetensors is damaged"):
        read_features(RunFolder(str(tmp_path)))
    with pytest.raises(DataError, match="is not the one that the run was trained with"):
        read_features(RunFolder(str(tmp_path)), "0" * 64)


def test_hashes_of_different_rows_differ() -> None:
    columns = {"one": texts(["a", "b", "a", ""]), "two": texts(["b", "a", "b", ""])}
    found = row_hashes(columns)
    assert found[0] == found[2] and len(set(found.tolist())) == 3


def test_rejects_invalid_settings() -> None:
    for flags, said in (
        (["--columns", "price"], "--columns names price"),
        (["--columns", "a", "a"], "lists the same name twice"),
        (["--features", "image"], "--features is 'image'"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse(Config, flags, prog="train", description="")


def test_a_missing_column_is_named() -> None:
    rows = table(price=[1.0, 2], title=["a", "b"])
    with pytest.raises(DataError, match="has no column 'catalog_content', which --features text needs") as caught:
        training_columns(Config(features=("text",)), rows)
    assert "--text-column" in caught.value.remedy
    with pytest.raises(DataError, match="has no column 'tilte'") as caught:
        training_columns(Config(columns=("tilte",)), rows)
    assert caught.value.remedy == "did you mean title? correct --columns"
    features = fitted(rows, Config(columns=("title",)))
    with pytest.raises(DataError, match="has no column 'title', which the model was trained with"):
        columns_of(features, replace(rows, frame=rows.frame.drop(columns="title")))


def test_both_networks_use_the_computed_roles() -> None:
    dims = {"clip_image": 3, "siglip_image": 3, "siglip_text": 3, "qwen_text": 3, "text_words": 5, "columns": 2}
    for model in ("concat", "fusion"):
        network = build_network(Config(model=model, width=16, n_heads=2, hidden=(8,)), dims).eval()
        inputs = {role: torch.zeros(2, dim) for role, dim in dims.items()}
        present = {role: torch.ones(2, dtype=torch.bool) for role in dims}
        before = network(inputs, present)
        for role in ("text_words", "columns"):
            assert (network(inputs | {role: torch.ones(2, dims[role])}, present) != before).all(), (model, role)


def best(output: Path) -> tuple[Path, manifests.Checkpoint]:
    pointer = pointers.read(RunPointer, str(output), "runs", "all_embeddings", "best")
    assert pointer is not None
    run = output / "runs" / pointer.run_id
    return run, RunFolder(str(run)).best()


def test_a_run_with_computed_sources(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--output", str(tmp_path)]
    assert train.main(["--data", str(catalog), *where, *SMALL, "--epochs", "2", *WITH_FEATURES]) == 0
    run, checkpoint = best(tmp_path)
    assert checkpoint.manifest.features_sha256
    roles = list(read_features(RunFolder(str(run)), checkpoint.manifest.features_sha256).dims)
    assert roles == ["text_words", "text_chars", "text_numbers", "columns"], "its texts have no lines with labels"
    assert evaluate_by_groups.main([*where, "--by", "category"]) == 0
    assert predict_test.main(where) == 0
    said = capsys.readouterr().err
    looked = set(re.findall(r"looked role=(\w+)", said))
    assert {"clip_image", "text_chars"} <= looked and not looked & {"text_words", "text_numbers", "columns"}
    assert (
        "text_chars qwen_text" in checkpoint.manifest.agreement
        or "qwen_text text_chars" in checkpoint.manifest.agreement
    )
    assert run_command("fusion.verify", str(tmp_path)).code == 0
    pull = ["fusion.jobs.pull", "run", run.name, "--output", str(tmp_path), "--to", str(tmp_path / "pulled")]
    assert run_command(*pull).code == 0
    pulled = tmp_path / "pulled/runs" / run.name / "features.safetensors"
    assert pulled.read_bytes() == (run / "features.safetensors").read_bytes()
    pulled.write_bytes(b"damaged")
    assert run_command(*pull, "--check").code == 65
    (run / "features.safetensors").unlink()
    assert predict_test.main([*where, "--force", "--name", "other"]) == 65
    assert "features.safetensors does not exist" in capsys.readouterr().err


def test_rejects_a_test_table_without_the_column(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, where = tmp_path / "data", ["--output", str(tmp_path / "out")]
    shutil.copytree(catalog, data)
    assert train.main(["--data", str(data), *where, *SMALL, "--epochs", "1", *WITH_FEATURES]) == 0
    test = pd.read_csv(data / "test.csv", dtype="str")
    test.drop(columns="category").to_csv(data / "test.csv", index=False)
    assert predict_test.main(where) == 65
    assert "test.csv has no column 'category', which the model was trained with" in capsys.readouterr().err


def test_all_sources_under_the_same_wrong_ids_are_refused_on_the_first_night(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, where = tmp_path / "data", ["--output", str(tmp_path / "out")]
    generate(data, n_products=2400, dims=DIMS, n_test=800)
    flags = ["--data", str(data), *where, *SMALL, "--epochs", "1", "--features", "text"]
    assert train.main(flags) == 0
    assert predict_test.main(where) == 0
    ids = pd.read_csv(data / "test.csv", dtype="str")["sample_id"].to_numpy()
    other = dict(zip(ids, np.random.default_rng(9).permutation(ids), strict=True))
    for path in (data / "embeddings" / "test").glob("*.parquet"):
        rows = pd.read_parquet(path)
        rows["sample_id"] = [int(other.get(str(one), str(one))) for one in rows["sample_id"]]
        rows.to_parquet(path, index=False)
    assert predict_test.main([*where, "--name", "first"]) == 65
    assert "text_chars do not belong together as in training" in capsys.readouterr().err


def test_other_texts_are_other_data(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, where = tmp_path / "data", ["--output", str(tmp_path / "out"), "--run-id", "r"]
    shutil.copytree(catalog, data)
    training = ["--data", str(data), *where, *SMALL, "--epochs", "1", *WITH_FEATURES]
    assert train.main(training) == 0
    rows = pd.read_csv(data / "train.csv", dtype="str")
    rows.assign(catalog_content=rows["catalog_content"] + " new").to_csv(data / "train.csv", index=False)
    assert evaluate_by_groups.main(where) == 65
    assert "have other prices or embeddings than in training" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out/runs/r/checkpoints")
    assert train.main(training) == 65
    assert "the data have changed since run r began" in capsys.readouterr().err


def test_the_result_does_not_depend_on_the_number_of_ranks(catalog: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        output = str(tmp_path / str(ranks))
        flags = ["--data", str(catalog), "--output", output, *SMALL, "--epochs", "1", "--dropout", "0", *WITH_FEATURES]
        done = run_command("fusion.all_embeddings.train", *flags, ranks=ranks)
        assert done.code == 0, done.err
        run, checkpoint = best(Path(output))
        digests = checkpoint.manifest.validation_sha256, checkpoint.manifest.features_sha256
        found.append((digests, checkpoint.smape, (run / "run.json").read_bytes().find(b"text_words")))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_nothing_is_learned_from_shuffled_prices(catalog: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    rows = pd.read_csv(data / "train.csv", dtype="str")
    shuffled = rows["price"].to_numpy()[np.random.default_rng(1).permutation(len(rows))]
    rows.assign(price=shuffled).to_csv(data / "train.csv", index=False)
    flags = ["--data", str(data), "--output", str(tmp_path / "out"), *SMALL, "--epochs", "5", "--loss", "smape"]
    assert train.main([*flags, *WITH_FEATURES]) == 0
    _, checkpoint = best(tmp_path / "out")
    split = pd.read_parquet(next((tmp_path / "out").rglob("split.parquet")))
    sides = dict(list(split.groupby("side")["price"]))
    median = compute_smape(sides["validation"], np.full(len(sides["validation"]), sides["train"].median()))
    assert checkpoint.smape > 0.95 * median


def test_the_table_is_read_with_its_texts_once(catalog: Path) -> None:
    rows = read_table(str(catalog), "train", priced=True, columns=["catalog_content", "category"], hashed=())
    columns = training_columns(Config(features=("text",), columns=("category",)), rows)
    assert {name: len(values) for name, values in columns.items()} == {
        "catalog_content": len(rows),
        "category": len(rows),
    }
