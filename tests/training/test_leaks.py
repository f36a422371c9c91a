"""What cannot be known is not known: a validation is no better than chance where nothing tells of the prices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion.all_embeddings import train
from fusion.metrics import row_smape
from fusion.records import manifests
from fusion.records.run import RunFolder
from fusion.records.validation import validation_of
from tests.conftest import SMALL

RECIPES = {"best": ["--folds", "2"], "published": ["--recipe", "published", "--folds", "2"]}
LUCK = 3.0  # standard errors: what chance alone exceeds in one of 700 trials


def trained(data: Path, output: Path, *more: str) -> manifests.Checkpoint:
    flags = ["--data", str(data), "--output", str(output), "--run-id", "r", *SMALL, "--epochs", "6"]
    assert train.main([*flags, *more]) == 0
    return RunFolder(str(output / "runs/r")).best()


def gain(made: manifests.Checkpoint) -> tuple[float, float]:
    """By how much the SMAPE of the validation rows is below that of their median price, and the error of this."""
    rows = validation_of(made)
    median = np.full(len(rows), rows["price"].median())
    gains = row_smape(rows["price"], median) - row_smape(rows["price"], rows["predicted"])
    return float(gains.mean()), float(gains.std() / np.sqrt(len(rows)))


def copied(catalog: Path, folder: Path) -> Path:
    return Path(shutil.copytree(catalog, folder / "data"))


def shuffle_prices(data: Path) -> None:
    """Products get the prices of others; those of the same text keep the same one."""
    table = pd.read_csv(data / "train.csv")
    groups = pd.factorize(table["catalog_content"])[0]
    prices = table.groupby(groups)["price"].first().to_numpy()
    table["price"] = np.random.default_rng(0).permutation(prices)[groups]
    table.to_csv(data / "train.csv", index=False)


def make_noise(data: Path) -> None:
    """Each source gets vectors that were drawn without a look at the products."""
    generator = np.random.default_rng(0)
    for path in sorted((data / "embeddings/train").glob("*.parquet")):
        table = pq.read_table(path)
        dim = table.schema.field("embedding").type.list_size
        noise = generator.standard_normal(len(table) * dim).astype(np.float16)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(noise), dim)
        pq.write_table(table.set_column(table.schema.get_field_index("embedding"), "embedding", vectors), path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_tells_of_prices_is_learned(recipe: str, catalog: Path, tmp_path: Path) -> None:
    """Else nothing would follow from the tests below."""
    better, error = gain(trained(catalog, tmp_path, *RECIPES[recipe]))
    assert better > LUCK * error


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("spoil", [shuffle_prices, make_noise])
def test_chance_is_not_beaten(spoil: Callable[[Path], None], recipe: str, catalog: Path, tmp_path: Path) -> None:
    data = copied(catalog, tmp_path)
    spoil(data)
    better, error = gain(trained(data, tmp_path / "output", *RECIPES[recipe]))
    assert better < LUCK * error


@pytest.mark.parametrize("recipe", [[], ["--recipe", "published", "--schedule", "cosine"]])
def test_prices_of_rows_that_validate_change_no_weight(recipe: list[str], catalog: Path, tmp_path: Path) -> None:
    """The last weights are kept, so that no choice by validation is one of the differences."""
    data, contents = copied(catalog, tmp_path), []
    table = pd.read_csv(data / "train.csv")
    table["created"] = np.where(np.arange(len(table)) < 400, "2026-01-01", "2026-02-01")
    for factor in (1.0, 3.0):
        changed = table.assign(price=table["price"].where(table["created"] < "2026-02-01", table["price"] * factor))
        changed.to_csv(data / "train.csv", index=False)
        made = trained(data, tmp_path / str(factor), "--validate-after", "created", "2026-02-01", *recipe)
        contents.append(manifests.read_file(made, manifests.MODEL))
    assert contents[0] == contents[1]
