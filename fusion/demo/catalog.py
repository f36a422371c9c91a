"""Generates a product catalog with known true prices, to try all commands without data.

    python -c "from pathlib import Path; from fusion.demo.catalog import generate; generate(Path('demo'))"

Each product has 12 visual and 12 textual latent factors, 4 of which are shared. Its log price is a nonlinear function
of both plus noise, so the best possible score is known. Each embedding source encodes the latents of its modality, with
the flaws of real data: constant columns, different scales, placeholder images, missing and broken rows, and
near-duplicate products.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator
from numpy.typing import NDArray

from fusion.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DIMS: Mapping[str, int] = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}
# Latents per modality: the first N_OWN are its own, the others are shared. Each source is blind to N_BLIND of its
# modality's own latents, and different sources of a modality to different ones. The last N_STRUCTURAL columns of Qwen's
# embeddings describe the text (its length, digits and quantity).
N_LATENTS, N_OWN, N_BLIND, N_STRUCTURAL = 12, 8, 2, 3
# Shares of products that are copies of others, and that have a placeholder image; deviation of a copy's log price.
COPY_SHARE, PLACEHOLDER_SHARE, COPY_NOISE = 0.04, 0.0125, 0.02
# Effect of each latent relative to that of the previous one: on the price, and on embeddings.
DECAY, SALIENCE = 0.6, 0.8
ENCODER_NOISE = 0.05  # standard deviation per column; values are a tanh, from -1 to 1
LOG_MEDIAN, LOG_STD, LOWEST, HIGHEST = math.log(18.0), 1.05, 1.0, 600.0  # US dollars
QUANTITIES = np.array([1, 2, 3, 4, 6, 12])

NOUNS: Mapping[str, tuple[str, ...]] = {
    "kitchen": ("Saucepan", "Chopping Board", "Whisk", "Mixing Bowl"),
    "grocery": ("Olive Oil", "Green Tea", "Granola", "Pasta Sauce"),
    "garden": ("Watering Can", "Pruner", "Planter", "Hose Nozzle"),
    "office": ("Notebook", "Desk Lamp", "Stapler", "Pen Set"),
    "toys": ("Puzzle", "Building Blocks", "Plush Bear", "Kite"),
    "beauty": ("Hand Cream", "Shampoo", "Face Mask", "Soap Bar"),
    "pets": ("Dog Bowl", "Cat Tree", "Leash", "Bird Feeder"),
    "sports": ("Yoga Mat", "Water Bottle", "Jump Rope", "Headband"),
}
VOCABULARY: tuple[tuple[str, ...], ...] = (
    ("Alder", "Brightwell", "Corvina", "Dunmore", "Elmstead", "Farrow", "Glenhaven", "Harrow"),
    ("Basic", "Everyday", "Classic", "Select", "Premium", "Signature"),
    ("Coast", "Meadow", "Summit", "Harbour", "Ember"),
    ("white", "sage", "navy", "amber", "charcoal"),
    ("mini", "small", "medium", "large", "family"),
)


@dataclass(frozen=True, eq=False)
class Truth:
    """The true prices of the rows of `test.csv`, in its order; all three arrays are [n_test].

    `prices` (dollars) include the noise; `medians` do not. As both SMAPE and the noise are symmetric in log price,
    `medians` are the best possible prediction.
    """

    sample_ids: Ints
    prices: Floats
    medians: Floats


@dataclass(frozen=True, eq=False)
class _Catalog:
    """All products, training rows first. A copy has the latents and the text of its original."""

    n_train: int
    sample_ids: Ints
    origins: Ints
    no_image: NDArray[np.bool_]
    visual: Floats
    textual: Floats
    prices: Floats
    medians: Floats
    texts: pd.DataFrame


def generate(
    folder: Path,
    *,
    n_products: int = 6000,
    dims: Mapping[str, int] = DIMS,
    n_test: int | None = None,
    noise: float = 0.35,
    missing: float = 0.02,
    seed: int = 0,
) -> Truth:
    """Write `train.csv`, `test.csv`, `test_truth.csv` and `embeddings/<split>/<source>.parquet` below `folder`.

    One row of each split is in no source, and three rows per source contain a NaN. The same arguments give the same
    bytes.

    Args:
        n_products: number of products in both splits together.
        dims: source to dimension; a source is visual if its name contains "image", else textual.
        n_test: number of test products; a sixth of all by default.
        noise: standard deviation of the noise of log prices.
        missing: share of ids that each source lacks.

    Raises:
        ConfigError: an argument is out of range.
    """
    n_test = n_products // 6 if n_test is None else n_test
    _check(n_products, n_test, dims, noise, missing)
    catalog = _catalog(n_products, n_products - n_test, noise, np.random.default_rng([seed, 0]))
    folder.mkdir(parents=True, exist_ok=True)
    truth = _write_tables(folder, catalog)
    for index, name in enumerate(sorted(dims, key=lambda name: "image" in name)):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        _write_source(folder, name, catalog, _embed(name, dims[name], index, catalog, rng), missing, rng)
    return truth


def _check(n_products: int, n_test: int, dims: Mapping[str, int], noise: float, missing: float) -> None:
    if not 4 <= n_test <= n_products - 4:
        raise ConfigError(f"{n_test} test rows of {n_products} products", "leave at least 4 rows to each split")
    if noise < 0 or not 0 <= missing < 0.5:
        raise ConfigError(f"noise={noise}, missing={missing}", "choose noise >= 0 and 0 <= missing < 0.5")
    if not dims or min(dims.values()) < 1:
        raise ConfigError(f"sources {dict(dims)}", "name at least one source, each with a dim of 1 or more")


def _catalog(n: int, n_train: int, noise: float, rng: Generator) -> _Catalog:
    sides = (np.arange(n_train), np.arange(n_train, n))
    origins = np.concatenate([_origins(side, rng) for side in sides])
    no_image = np.concatenate([rng.permutation(len(side)) < PLACEHOLDER_SHARE * len(side) for side in sides])[origins]
    shared = rng.standard_normal((n, N_LATENTS - N_OWN))
    visual, textual = (np.hstack([rng.standard_normal((n, N_OWN)), shared])[origins] for _ in range(2))
    log_median, is_copy = _log_prices(visual, textual), origins != np.arange(n)
    error = noise * rng.standard_normal(n)[origins] + COPY_NOISE * is_copy * rng.standard_normal(n)
    prices, medians = _dollars(log_median + error), _dollars(log_median)
    sample_ids = 100_000 + rng.choice(20 * n, n, replace=False).astype(np.int64)
    texts = _texts(textual, rng.permutation(n)[origins])
    return _Catalog(n_train, sample_ids, origins, no_image, visual, textual, prices, medians, texts)


def _origins(side: Ints, rng: Generator) -> Ints:
    """For each row, the row that it copies, or the row itself.

    A copy is in the same split as its original. Otherwise its price could be predicted better than by the median.
    """
    origins, order = side.copy(), rng.permutation(len(side))
    n_copies = round(COPY_SHARE * len(side))
    origins[order[:n_copies]] = side[rng.choice(order[n_copies:], n_copies)]
    return origins


def _log_prices(visual: Floats, textual: Floats) -> Floats:
    """[n, 12] and [n, 12] -> [n] log dollars: linear terms, absolute values, and a product of both modalities."""
    weights = np.random.default_rng(41).standard_normal((4, N_LATENTS))
    weights *= DECAY ** np.arange(N_LATENTS)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    (look, size), (brand, kind) = weights[:2] @ visual.T, weights[2:] @ textual.T
    score = look + brand + 0.3 * (size + kind) + 0.35 * (np.abs(look) + np.abs(brand))
    score += 0.9 * np.tanh(1.5 * size) * np.tanh(1.5 * kind)
    standard: Floats = (score - score.mean()) / score.std()
    return LOG_MEDIAN + LOG_STD * standard


def _dollars(log_price: Floats) -> Floats:
    return np.round(np.clip(np.exp(log_price), LOWEST, HIGHEST), 2)


def _levels(latent: Floats, n_levels: int) -> Ints:
    """[n] standard normal -> [n] levels from 0 to n_levels - 1 of about equal frequency.

    A logistic function with slope 1.7 is close to the normal distribution function.
    """
    share = 1 / (1 + np.exp(-1.7 * latent))
    return np.minimum(n_levels * share, n_levels - 1).astype(np.int64)


def _texts(textual: Floats, models: Ints) -> pd.DataFrame:
    """[n, 12] latents and [n] model numbers, one per original -> catalog_content, category and quantity, n rows."""
    categories = np.array(list(NOUNS))[textual[:, :N_OWN].argmax(axis=1)]
    nouns = [NOUNS[name][level] for name, level in zip(categories, _levels(textual[:, 5], 4), strict=True)]
    quantities = QUANTITIES[_levels(textual[:, 6], len(QUANTITIES))]
    words = [np.array(w)[_levels(textual[:, i], len(w))] for i, w in enumerate(VOCABULARY)]
    template = "{} {} {}, {} series, pack of {}. Colour: {}. Size: {}. Model F-{:05d}."
    columns = (words[0], words[1], nouns, words[2], quantities, words[3], words[4], models)
    contents = [template.format(*row) for row in zip(*columns, strict=True)]
    return pd.DataFrame({"catalog_content": contents, "category": categories, "quantity": quantities})


def _write_tables(folder: Path, catalog: _Catalog) -> Truth:
    products = catalog.texts[["catalog_content", "category"]].copy()
    products.insert(0, "sample_id", catalog.sample_ids)
    products.insert(1, "price", catalog.prices)
    _write_csv(products[: catalog.n_train], folder / "train.csv")
    test = products[catalog.n_train :].assign(median=catalog.medians[catalog.n_train :])
    _write_csv(test.drop(columns=["price", "median"]), folder / "test.csv")
    _write_csv(test[["sample_id", "price", "median"]], folder / "test_truth.csv")
    return Truth(*(test[column].to_numpy().copy() for column in ("sample_id", "price", "median")))


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.2f", lineterminator="\n")


def _embed(name: str, dim: int, index: int, catalog: _Catalog, rng: Generator) -> NDArray[np.float16]:
    """[n, dim] embeddings: a random map of all latents but two; all products without an image get the same vector.

    Args:
        index: number of the source; sources with odd and even numbers miss different latents.
    """
    visual = "image" in name
    latents = catalog.visual if visual else catalog.textual
    mixing = rng.standard_normal((N_LATENTS, dim), dtype=np.float32) / math.sqrt(N_LATENTS)
    mixing *= SALIENCE ** np.arange(N_LATENTS, dtype=np.float32)[:, None]
    first = N_OWN - N_BLIND * (1 + index % 2)
    mixing[first : first + N_BLIND] = 0
    bias = 0.2 * rng.standard_normal(dim, dtype=np.float32)
    values = np.tanh(latents.astype(np.float32) @ mixing + bias)
    values += ENCODER_NOISE * rng.standard_normal(values.shape, dtype=np.float32)
    values *= 10 ** rng.uniform(-1.0, 0.7)
    if name.startswith("qwen") and dim > 2 * N_STRUCTURAL:
        text, quantity = catalog.texts["catalog_content"].str, catalog.texts["quantity"]
        values[:, -N_STRUCTURAL:] = np.column_stack([text.len(), text.count(r"\d"), quantity])
    _flatten_columns(values, rng)
    if visual:
        values[catalog.no_image] = values[catalog.no_image][:1]
    embedded: NDArray[np.float16] = values.astype(np.float16)[catalog.origins]
    return embedded


def _flatten_columns(values: NDArray[np.float32], rng: Generator) -> None:
    """Make two columns constant and one nearly constant, in place, like dead units of encoders."""
    width = values.shape[1] - N_STRUCTURAL
    if width < 2:
        return
    columns = rng.permutation(width)[:3]
    values[:, columns] = values[0, columns]
    values[:, columns[2:]] *= 1 + 1e-3 * rng.standard_normal((len(values), 1), dtype=np.float32)


def _write_source(
    folder: Path, name: str, catalog: _Catalog, values: NDArray[np.float16], missing: float, rng: Generator
) -> None:
    """Write both splits in random order, without the last row of each and without a share of the other rows."""
    train, test = np.split(np.arange(len(values)), [catalog.n_train])
    for split, rows, n_broken in (("train", train, 2), ("test", test, 1)):
        n_absent = max(1, round(missing * len(rows)))
        kept = rng.permutation(rows[:-1])[n_absent - 1 :]
        broken = rng.choice(kept, n_broken, replace=False)
        values[broken, rng.integers(values.shape[1], size=n_broken)] = np.nan
        _write_parquet(folder / "embeddings" / split / f"{name}.parquet", catalog.sample_ids[kept], values[kept])


def _write_parquet(path: Path, sample_ids: Ints, values: NDArray[np.float16]) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"sample_id": sample_ids, "embedding": vectors})
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=2048)
