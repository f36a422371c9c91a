"""No leaks: if embeddings have no information about prices, validation is no better than chance."""

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
# Standard errors. By chance alone, a gain exceeds this in one of 700 trials (the tail of the normal distribution).
CHANCE = 3.0


def trained(data: Path, output: Path, *more: str) -> manifests.Checkpoint:
    flags = ["--data", str(data), "--output", str(output), "--run-id", "r", *SMALL, "--epochs", "6"]
    assert train.main([*flags, *more]) == 0
    return RunFolder(str(output / "runs/r")).best()


def gain(made: manifests.Checkpoint) -> tuple[float, float]:
    """Returns by how much the SMAPE of validation rows is lower than that of their median, and its standard error."""
    rows = validation_of(made)
    median = np.full(len(rows), rows["price"].median())
    gains = row_smape(rows["price"], median) - row_smape(rows["price"], rows["predicted"])
    return float(gains.mean()), float(gains.std() / np.sqrt(len(rows)))


def copied(catalog: Path, folder: Path) -> Path:
    return Path(shutil.copytree(catalog, folder / "data"))


def shuffle_prices(data: Path) -> None:
    """Permutes prices between products; products with the same text still have the same price."""
    table = pd.read_csv(data / "train.csv")
    groups = pd.factorize(table["catalog_content"])[0]
    prices = table.groupby(groups)["price"].first().to_numpy()
    table["price"] = np.random.default_rng(0).permutation(prices)[groups]
    table.to_csv(data / "train.csv", index=False)


def make_noise(data: Path) -> None:
    """Replaces the vectors of each source by random ones."""
    generator = np.random.default_rng(0)
    for path in sorted((data / "embeddings/train").glob("*.parquet")):
        table = pq.read_table(path)
        dim = table.schema.field("embedding").type.list_size
        noise = generator.standard_normal(len(table) * dim).astype(np.float16)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(noise), dim)
        pq.write_table(table.set_column(table.schema.get_field_index("embedding"), "embedding", vectors), path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_informative_embeddings_are_better_than_chance(recipe: str, catalog: Path, tmp_path: Path) -> None:
    """Without this, the tests below would prove nothing."""
    better, error = gain(trained(catalog, tmp_path, *RECIPES[recipe]))
    assert better > CHANCE * error


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("spoil", [shuffle_prices, make_noise])
def test_uninformative_data_are_not_better_than_chance(
    spoil: Callable[[Path], None], recipe: str, catalog: Path, tmp_path: Path
) -> None:
    data = copied(catalog, tmp_path)
    spoil(data)
    better, error = gain(trained(data, tmp_path / "output", *RECIPES[recipe]))
    assert better < CHANCE * error


@pytest.mark.parametrize("recipe", [[], ["--recipe", "published", "--schedule", "cosine"]])
def test_validation_prices_do_not_change_the_weights(recipe: list[str], catalog: Path, tmp_path: Path) -> None:
    """Both recipes use the cosine schedule, which keeps the last weights: validation does not choose among them."""
    data, contents = copied(catalog, tmp_path), []
    table = pd.read_csv(data / "train.csv")
    table["created"] = np.where(np.arange(len(table)) < 400, "2026-01-01", "2026-02-01")
    for factor in (1.0, 3.0):
        changed = table.assign(price=table["price"].where(table["created"] < "2026-02-01", table["price"] * factor))
        changed.to_csv(data / "train.csv", index=False)
        made = trained(data, tmp_path / str(factor), "--validate-after", "created", "2026-02-01", *recipe)
        contents.append(manifests.read_file(made, manifests.MODEL))
    assert contents[0] == contents[1]
