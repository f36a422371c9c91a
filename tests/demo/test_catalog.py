from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion.demo.catalog import Truth, generate
from fusion.errors import ConfigError

DIMS = {"front_image": 24, "back_image": 16, "title_text": 20, "qwen_text": 19}
N, N_TEST = 1200, 200


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, generate(folder, n_products=N, dims=DIMS, missing=0.05)


def read(folder: Path, split: str, source: str) -> pd.DataFrame:
    """One row a product, indexed by sample_id; NaN rows included."""
    table = pq.read_table(folder / "embeddings" / split / f"{source}.parquet")
    values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return pd.DataFrame(values.astype(np.float32), index=table["sample_id"].to_numpy())


def smape(prices: np.ndarray, predicted: np.ndarray | float) -> float:
    return float(200 * np.mean(np.abs(prices - predicted) / (prices + predicted)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        generate(tmp_path / name, n_products=80, dims={"image": 8, "text": 9}, seed=seed)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys() and all(one[key] != other[key] for key in one)


def test_csvs_have_the_columns_of_the_contract(demo: tuple[Path, Truth]) -> None:
    train, test = (pd.read_csv(demo[0] / f"{split}.csv") for split in ("train", "test"))
    assert list(train) == ["sample_id", "price", "catalog_content", "category"]
    assert list(test) == ["sample_id", "catalog_content", "category"]
    assert (len(train), len(test)) == (N - N_TEST, N_TEST)
    assert pd.concat([train, test]).sample_id.is_unique


@pytest.mark.parametrize("source", DIMS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_embeddings_are_float16_lists_in_an_order_of_their_own(
    demo: tuple[Path, Truth], split: str, source: str
) -> None:
    file = pq.ParquetFile(demo[0] / "embeddings" / split / f"{source}.parquet")
    assert file.schema_arrow.field("sample_id").type == pa.int64()
    assert file.schema_arrow.field("embedding").type == pa.list_(pa.float16(), DIMS[source])
    assert file.metadata.row_group(0).column(1).compression == "UNCOMPRESSED"
    ids, order = read(demo[0], split, source).index, pd.read_csv(demo[0] / f"{split}.csv").sample_id
    assert ids.is_unique
    assert list(ids) != list(order[order.isin(ids)])


def test_row_groups_hold_2048_rows(tmp_path: Path) -> None:
    generate(tmp_path, n_products=3000, dims={"text": 6}, n_test=100, missing=0.0)
    metadata = pq.read_metadata(tmp_path / "embeddings" / "train" / "text.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2048, 2899 - 2048]


@pytest.mark.parametrize(("split", "n_rows", "n_broken"), [("train", N - N_TEST, 2), ("test", N_TEST, 1)])
def test_some_rows_are_missing_or_broken_and_one_is_in_no_source(
    demo: tuple[Path, Truth], split: str, n_rows: int, n_broken: int
) -> None:
    sources = [read(demo[0], split, source) for source in DIMS]
    ids = set(pd.read_csv(demo[0] / f"{split}.csv").sample_id)
    absent = [ids - set(source.index) for source in sources]
    assert all(set(source.index) < ids for source in sources)
    assert {len(gone) for gone in absent} == {round(0.05 * n_rows)}
    assert len(set.intersection(*absent)) == 1
    assert {int(source.isna().any(axis=1).sum()) for source in sources} == {n_broken}


def test_two_columns_are_constant_and_structural_ones_describe_the_text(demo: tuple[Path, Truth]) -> None:
    sources = {name: pd.concat([read(demo[0], split, name) for split in ("train", "test")]) for name in DIMS}
    assert {name: int((source.nunique() == 1).sum()) for name, source in sources.items()} == dict.fromkeys(DIMS, 2)
    structural = sources["qwen_text"].dropna().loc[lambda s: s.index.isin(pd.read_csv(demo[0] / "test.csv").sample_id)]
    text = pd.read_csv(demo[0] / "test.csv").set_index("sample_id").catalog_content[structural.index]
    assert (structural[16] == text.str.len()).all()
    assert (structural[17] == text.str.count(r"\d")).all()
    assert (structural[18] == text.str.extract(r"pack of (\d+)")[0].astype(int)).all()


def test_copies_share_text_and_image_and_nearly_the_price(demo: tuple[Path, Truth]) -> None:
    train = pd.read_csv(demo[0] / "train.csv").set_index("sample_id")
    copies = train[train.duplicated("catalog_content")]
    originals = train.drop_duplicates("catalog_content").set_index("catalog_content").price
    assert len(copies) == round(0.04 * len(train))
    ratio = copies.price / copies.catalog_content.map(originals)
    assert ratio.between(0.85, 1.18).all()
    image = read(demo[0], "train", "front_image").dropna()
    groups = image.groupby(train.catalog_content[image.index])
    assert (groups.nunique() == 1).all(axis=None)
    assert not set(train.catalog_content) & set(pd.read_csv(demo[0] / "test.csv").catalog_content)


def test_the_placeholder_is_frequent_enough_to_be_recognised(tmp_path: Path) -> None:
    generate(tmp_path, dims={"image": 6, "text": 6})
    counts = read(tmp_path, "train", "image").dropna().value_counts()
    assert counts.iloc[0] > 50
    assert counts.iloc[1] < 6


def test_truth_is_aligned_with_the_test_rows_and_scores_what_the_noise_allows(tmp_path: Path) -> None:
    truth = generate(tmp_path, dims={"text": 6})
    table = pd.read_csv(tmp_path / "test_truth.csv")
    assert list(table) == ["sample_id", "price", "median"]
    assert list(pd.read_csv(tmp_path / "test.csv").sample_id) == list(truth.sample_ids) == list(table.sample_id)
    assert np.array_equal(table.price, truth.prices) and np.array_equal(table["median"], truth.medians)
    baseline = float(pd.read_csv(tmp_path / "train.csv").price.median())
    assert 15 < baseline < 20
    assert 26 < smape(truth.prices, truth.medians) < 30
    assert 70 < smape(truth.prices, baseline) < 80


def test_without_noise_the_medians_are_the_prices_of_all_but_copies(tmp_path: Path) -> None:
    truth = generate(tmp_path, n_products=600, dims={"text": 6}, noise=0.0)
    assert 0.96 <= np.mean(truth.prices == truth.medians) < 1


def test_a_tiny_catalog_with_roles_of_any_name(tmp_path: Path) -> None:
    truth = generate(tmp_path, n_products=60, dims={"a": 5, "b": 7})
    assert len(truth.prices) == 10
    assert read(tmp_path, "train", "a").shape == (49, 5)
    assert read(tmp_path, "test", "b").shape == (9, 7)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"n_products": 6}, "1 test rows"),
        ({"noise": -1.0}, "noise"),
        ({"missing": 0.5}, "missing"),
        ({"dims": {}}, "{}"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        generate(tmp_path, **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
