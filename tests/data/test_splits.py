"""Which rows train and which validate: shares, folds, dates, groups on one side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion.config import RunConfig
from fusion.data.duplicates import near_duplicate_groups
from fusion.data.splits import split_rows
from fusion.data.tables import Table
from fusion.errors import DataError
from tests.data.tables_of_noise import make, noise


def sides(table: Table, vectors: dict[str, np.ndarray] | None = None, **settings: object) -> pd.DataFrame:
    config = RunConfig(**settings)  # type: ignore[arg-type]
    return split_rows(table, near_duplicate_groups(table, vectors or {"image": noise(len(table))}, config), config)


def test_four_fifths_train_and_every_price_quantile_is_on_both_sides() -> None:
    split = sides(make())
    assert (split["side"] == "validation").sum() == 200
    decile = pd.qcut(split["price"], 10, labels=False)
    assert split[split["side"] == "validation"].groupby(decile).size().tolist() == [20] * 10
    assert len(sides(make(), val_fraction=0.35).query("side == 'validation'")) == 350


def test_a_seed_gives_one_split_and_another_seed_another() -> None:
    pd.testing.assert_frame_equal(sides(make()), sides(make()))
    assert (sides(make())["side"] != sides(make(), seed=42)["side"]).any()


@pytest.mark.parametrize("settings", [{}, {"folds": 5, "fold": 2}])
def test_near_duplicates_stay_on_one_side(settings: dict[str, int]) -> None:
    rng = np.random.default_rng(2)
    table = make(catalog_content=[f"text {i}" for i in rng.integers(0, 700, 1000)])
    image = noise()[rng.integers(0, 800, 1000)]
    split = sides(table, {"image": image}, **settings).assign(text=table.frame["catalog_content"].to_numpy())
    split["image"] = [row.tobytes() for row in image]
    assert split.groupby("text")["side"].nunique().max() == 1
    assert split.groupby("image")["side"].nunique().max() == 1
    assert set(split["side"]) == {"train", "validation"}


def test_folds_validate_every_row_once() -> None:
    folds = [sides(make(), folds=5, fold=k)["side"] == "validation" for k in range(5)]
    assert (np.sum(folds, axis=0) == 1).all()


def test_an_unknown_group_column() -> None:
    with pytest.raises(DataError, match="no column 'brand'"):
        sides(make(), group_column="brand")


def test_a_missing_text_column_is_an_error_if_it_was_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no column 'titel'"):
        sides(make(), text_column="titel")
    frame = make().frame.rename(columns={"catalog_content": "title"})
    sides(Table(frame, np.arange(1000), ("sample_id", "price", "title")))
    assert "event=texts_not_compared" in (said := capsys.readouterr().err) and "--text-column title" in said
    assert sides(Table(frame, np.arange(1000)), text_column="title") is not None


@pytest.mark.parametrize("share", [0.3, 0.55])
def test_a_large_group_does_not_change_the_share_of_rows(share: float) -> None:
    brands = ["x"] * int(share * 1000) + [""] * (1000 - int(share * 1000))
    for seed in range(20):
        validates = sides(make(brand=brands), group_column="brand", seed=seed)["side"] == "validation"
        assert 0.18 < validates.mean() < 0.22


def test_folds_beside_a_large_group(capsys: pytest.CaptureFixture[str]) -> None:
    table = make(brand=["x"] * 550 + [""] * 450)
    shares = [(sides(table, group_column="brand", folds=5, fold=k)["side"] == "validation").mean() for k in range(5)]
    assert sorted(shares) == pytest.approx([0.1125] * 4 + [0.55], abs=0.01)
    assert "event=uneven_split" in capsys.readouterr().err


def test_many_groups_of_medium_size_split_by_rows() -> None:
    rng = np.random.default_rng(5)
    brands = [f"b{i}" for i in rng.zipf(1.5, 1000).clip(max=400)]
    for seed in range(20):
        validates = sides(make(brand=brands), group_column="brand", seed=seed)["side"] == "validation"
        assert 0.17 < validates.mean() < 0.23


def test_any_seed_and_twenty_rows() -> None:
    assert (sides(make(20), val_fraction=0.4, seed=2**32 - 1)["side"] == "validation").sum() == 8


def test_too_few_groups() -> None:
    with pytest.raises(DataError, match="1 groups of rows cannot be split into 2 parts"):
        sides(make(brand=["x"] * 1000), group_column="brand")


@pytest.mark.parametrize("n", [5, 6, 11, 23])
def test_small_tables_split(n: int) -> None:
    split = sides(make(n))
    assert 1 <= (split["side"] == "validation").sum() <= n // 2


def test_the_command_stores_what_it_used(tmp_path: Path) -> None:
    from fusion.records.split import to_parquet

    (tmp_path / "split.parquet").write_bytes(to_parquet(sides(make())))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "split.parquet"), sides(make()))


def dated(n: int = 1000, **columns: object) -> Table:
    days = pd.date_range("2026-01-01", periods=n, freq="h").strftime("%Y-%m-%dT%H:%M:%S")
    return make(n, created=pd.Series(days).sample(frac=1, random_state=0).to_numpy(), **columns)


def test_later_rows_validate_and_earlier_ones_train() -> None:
    table = dated()
    split = sides(table, validate_after=("created", "2026-01-31"))
    is_late = table.frame["created"].to_numpy() >= "2026-01-31"
    assert (split["side"] == np.where(is_late, "validation", "train")).all()
    later = sides(table, validate_after=("created", "2026-01-31T05:00+02:00"))
    assert (later["side"] == "validation").sum() == is_late.sum() - 3


def test_earlier_near_duplicates_of_later_rows_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    table = dated(catalog_content=[f"text {i}" for i in rng.integers(0, 700, 1000)])
    split = sides(table, validate_after=("created", "2026-01-31"))
    is_late = table.frame["created"].to_numpy() >= "2026-01-31"
    texts = table.frame["catalog_content"].to_numpy()
    seen_later = np.isin(texts, texts[is_late])
    assert (split["side"] == np.where(is_late, "validation", np.where(seen_later, "dropped", "train"))).all()
    n_dropped = int((seen_later & ~is_late).sum())
    assert n_dropped > 50 and f"dropped={n_dropped}" in capsys.readouterr().err


def test_a_date_that_leaves_no_rows_on_one_side() -> None:
    with pytest.raises(DataError, match="no row validates: the 1000 dates in 'created' are 2026-01-01 to 2026-02-11"):
        sides(dated(), validate_after=("created", "2027-01-01"))
    with pytest.raises(DataError, match="no row trains"):
        sides(dated(), validate_after=("created", "2026-01-01"))
    with pytest.raises(DataError, match="has no column 'creatd'") as caught:
        sides(dated(), validate_after=("creatd", "2026-01-31"))
    assert "--validate-after" in caught.value.remedy
