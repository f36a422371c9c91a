"""Which objects a split is read from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion import storage
from fusion.data.inputs import find_inputs, find_sources, find_table
from fusion.errors import DataError

ROLE = {"clip_image": "cnn"}


def write(data: str, *names: str) -> None:
    for name in names:
        storage.write(storage.join(data, name), name.encode())


def files(data: str, split: str = "train") -> list[str]:
    return [entry.url.split(f"/{split}/")[1] for entry in find_sources(data, split, ROLE)["clip_image"]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cnn.parquet"], ["cnn.parquet"]),
        (["cnn/b.parquet", "cnn/a.parquet", "cnn/notes.txt"], ["cnn/a.parquet", "cnn/b.parquet"]),
        (["cnn.parquet/part-0.parquet", "cnn.parquet/_SUCCESS"], ["cnn.parquet/part-0.parquet"]),
        (["cnn/a.parquet", "cnn/.b.parquet", "cnn/._a.parquet", "cnn/_c.parquet"], ["cnn/a.parquet"]),
        (["cnn.parquet", "cnn/notes.txt", "cnn2.parquet", "cnn2/a.parquet"], ["cnn.parquet"]),
    ],
)
def test_the_files_of_a_source(names: list[str], expected: list[str], tmp_path: Path) -> None:
    write(f"{tmp_path}/embeddings/train", *names)
    assert files(str(tmp_path)) == expected


def test_the_same_in_a_bucket(bucket: str) -> None:
    write(f"{bucket}/embeddings/train", "cnn/b[1].parquet", "cnn/._b.parquet", "cnn/a.parquet", "other.parquet")
    assert files(bucket) == ["cnn/a.parquet", "cnn/b[1].parquet"]


@pytest.mark.parametrize("others", [["cnn/a.parquet"], ["cnn.parquet/a.parquet", "cnn/a.parquet"]])
def test_rejects_a_source_that_is_both_file_and_folder(others: list[str], bucket: str) -> None:
    write(f"{bucket}/embeddings/train", "cnn.parquet", *others)  # only a bucket can hold x and x/y
    with pytest.raises(DataError, match=r"there are .*/train/cnn\.parquet and .*/train/cnn"):
        files(bucket)


def test_a_source_that_is_missing(tmp_path: Path) -> None:
    write(f"{tmp_path}/embeddings/train", "ccn.parquet", "text/a.parquet", "._x.parquet")
    with pytest.raises(DataError, match=r"(?m)train holds ccn, text$") as caught:
        files(str(tmp_path))
    assert caught.value.remedy == "did you mean ccn? name the source with --sources.clip-image NAME"
    with pytest.raises(DataError, match="test holds nothing") as caught:
        files(str(tmp_path), "test")
    assert "--" not in caught.value.remedy, "predict_test takes its sources from the run"


def test_a_numpy_file_in_place_of_a_source_is_converted_by_the_command_of_the_hint(tmp_path: Path) -> None:
    write(f"{tmp_path}/embeddings/train", "cnn.npy")
    with pytest.raises(DataError) as caught:
        files(str(tmp_path))
    npy = f"{tmp_path}/embeddings/train/cnn.npy"
    command = f"python -m fusion.convert --embeddings {npy} --ids IDS.npy --to {npy.removesuffix('npy')}parquet"
    assert caught.value.remedy == f"convert it: `{command}`"


def test_the_table(tmp_path: Path) -> None:
    write(str(tmp_path), "train.parquet", "embeddings/train/cnn.parquet")
    assert find_table(str(tmp_path), "train")[0].url.endswith("/train.parquet")
    write(str(tmp_path), "train.csv")
    assert find_table(f"{tmp_path}/", "train")[0].url == f"{tmp_path}/train.csv"


def test_a_wrong_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), "data/train.csv")
    monkeypatch.chdir(tmp_path)
    for data, folder in (("data/train.csv", "data"), (f"{tmp_path}/data/train.csv", f"{tmp_path}/data")):
        with pytest.raises(DataError, match=f"{data} is a file, expected the folder") as caught:
            find_table(data, "train")
        assert caught.value.remedy == f"give its folder: --data {folder}"
    with pytest.raises(DataError, match=r"neither data/test\.csv nor test\.parquet exists; data holds train\.csv"):
        find_table("data", "test")
    with pytest.raises(DataError, match="there is no folder nowhere") as caught:
        find_table("nowhere", "train")
    assert caught.value.remedy.startswith("name the folder that holds it, such as --data s3://my-bucket/data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds nothing"):
        find_table("empty", "train")
    for data, folder in (("dta", "data"), (f"{tmp_path}/dta/", f"{tmp_path}/data")):
        with pytest.raises(DataError, match=f"there is no folder {data}") as caught:
            find_table(data, "train")
        assert caught.value.remedy.startswith(f"did you mean {folder}? ")


def test_a_bucket_that_is_missing_is_named(bucket: str) -> None:
    with pytest.raises(DataError, match="there is no bucket my-buckt"):
        find_inputs("s3://my-buckt/data", "train", ROLE)


def test_a_written_object_changes_the_inputs(bucket: str, tmp_path: Path) -> None:
    for data in (bucket, str(tmp_path)):
        write(data, "train.csv", "embeddings/train/cnn/a.parquet")
        before = find_inputs(data, "train", ROLE)
        assert find_inputs(data, "train", ROLE) == before
        storage.write(f"{data}/embeddings/train/cnn/a.parquet", b"another")
        after = find_inputs(data, "train", ROLE)
        assert after != before and after.sources_digest() != before.sources_digest() and after.table == before.table
