"""Which objects the rows of a split come from, and a digest that changes when one of them does."""

from __future__ import annotations

from collections.abc import Mapping

from fusion import storage
from fusion.config import digest
from fusion.errors import DataError


def find_table(data: str, split: str) -> str:
    """URL of `train.csv` or `test.csv`, or of its Parquet.

    Raises:
        DataError: there is neither.
    """
    candidates = [storage.join(data, f"{split}.{ending}") for ending in ("csv", "parquet")]
    for url in candidates:
        if storage.exists(url):
            return url
    raise DataError(f"neither {candidates[0]} nor {split}.parquet exists", "--data must name the folder that holds it")


def source_files(data: str, split: str, role: str, name: str) -> list[str]:
    """URLs of the Parquet files of a source.

    Raises:
        DataError: there are none.
    """
    folder = storage.join(data, "embeddings", split)
    single = storage.join(folder, f"{name}.parquet")
    if storage.exists(single):
        return [single]
    files = [url for url in storage.ls(storage.join(folder, name)) if url.endswith(".parquet")]
    if not files:
        there = ", ".join(url.rsplit("/", 1)[-1].removesuffix(".parquet") for url in storage.ls(folder)) or "nothing"
        raise DataError(
            f"no {single} and no {name}/*.parquet for the role {role}; {folder} holds {there}",
            f"name the source with --sources.{role.replace('_', '-')} NAME",
        )
    return files


def sources_digest(data: str, split: str, bindings: Mapping[str, str]) -> str:
    """sha256 over the versions of every source file, which a bucket tells without sending the vectors.

    Args:
        bindings: role to the name of its source.

    Raises:
        DataError: a source does not exist.
    """
    files = {role: source_files(data, split, role, name) for role, name in bindings.items()}
    return digest({role: [storage.version_of(url) for url in urls] for role, urls in files.items()})
