"""Finds the objects that a split is read from, and computes a digest that changes when one of them changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fusion import storage
from fusion.config import digest
from fusion.errors import DataError, did_you_mean
from fusion.storage import Entry

_PARQUET = ".parquet"
# In the folder of a source while `fusion.prepare` writes its files: they may be some of the old and some of the new.
UNFINISHED = "_UNFINISHED"
Sources = Mapping[str, tuple[Entry, ...]]


@dataclass(frozen=True)
class Inputs:
    """The objects of a split, from one listing. Two listings are equal as long as no object was written in between.

    Attributes:
        table: the file `test.csv` or `test.parquet` (or of another split), or the files in a folder `test.parquet`.
        sources: role to the Parquet files of the source bound to it.
    """

    table: tuple[Entry, ...]
    sources: Sources

    def version(self) -> str:
        """A digest that changes when any of these objects is written. It needs no data beside the listings."""
        return digest([[entry.version for entry in self.table], self.sources_digest()])

    def sources_digest(self) -> str:
        """sha256 of the versions of all source files. Listings contain the versions, so no vector is read."""
        return digest({role: [entry.version for entry in files] for role, files in self.sources.items()})


def find_inputs(data: str, split: str, bindings: Mapping[str, str]) -> Inputs:
    """Finds the table and all source files.

    Lists two folders (three if the table is a folder); one request returns at most 1,000 objects.

    Args:
        bindings: role to the name of its source.

    Raises:
        DataError: the table or a source does not exist, or a source exists both as a file and as a folder.
    """
    return Inputs(find_table(data, split), find_sources(data, split, bindings))


def sources_folder(data: str, split: str) -> str:
    """URL of the folder with the sources of a split."""
    return storage.join(data, "embeddings", split)


def find_sources(data: str, split: str, bindings: Mapping[str, str]) -> Sources:
    """The source files of `find_inputs`, without the table."""
    folder = sources_folder(data, split)
    found = storage.find(folder)
    return {role: _files(folder, role, name, found) for role, name in bindings.items()}


def source_names(data: str, split: str) -> set[str]:
    """Names of all sources of a split."""
    return _names(storage.find(sources_folder(data, split)))


def find_table(data: str, split: str) -> tuple[Entry, ...]:
    """The files of a split's table: `train.csv`, else `train.parquet`, else the files in a folder of that name.

    Spark writes such folders.

    Raises:
        DataError: none of them exists.
    """
    there = {storage.base(entry.url): entry for entry in storage.entries(data)}
    for name in (f"{split}.csv", f"{split}{_PARQUET}"):
        if name in there and not there[name].is_folder:
            return (there[name],)
    folder = there.get(f"{split}{_PARQUET}")
    parts = _parts(f"{split}{_PARQUET}/", _below(folder.url)) if folder else ()
    if not parts:
        raise _no_table(data, split, sorted(there))
    return parts


def table_sha256(files: tuple[Entry, ...]) -> str:
    """sha256 of a table's file; of several files, a digest of their sha256."""
    parts = [storage.sha256(storage.read(entry.url)) for entry in files]
    return parts[0] if len(parts) == 1 else digest(parts)


def _below(folder: str) -> dict[str, Entry]:
    """The entries directly in a folder, by `<name of the folder>/<name of the entry>`."""
    name = storage.base(folder.rstrip("/"))
    return {f"{name}/{storage.base(entry.url)}": entry for entry in storage.entries(folder)}


def _no_table(data: str, split: str, there: list[str]) -> DataError:
    if not there and _is_file(data):
        folder = data.rstrip("/").rpartition("/")[0]
        message = f"{data} is a file, expected the folder that holds {split}.csv"
        return DataError(message, f"give its folder: --data {folder or '.'}")
    holds = f"{data} holds {', '.join(there[:10])}" if there else _nothing(data)
    return DataError(
        f"neither {storage.join(data, split)}.csv nor {split}{_PARQUET} exists; {holds}",
        f"{_similar_folder(data)}name the folder that holds it, such as --data s3://my-bucket/data; "
        "`python -m fusion.demo` makes an example in demo/data",
    )


def _nothing(data: str) -> str:
    is_absent = "://" not in data and not os.path.isdir(data)  # stores have no folders, so that all of them are there
    return f"there is no folder {data}" if is_absent else f"{data} holds nothing"


def _similar_folder(data: str) -> str:
    """The start of a hint with the local folder whose name is most similar to one that does not exist."""
    parent, name = os.path.split(data.rstrip("/"))
    if "://" in data or os.path.isdir(data) or not os.path.isdir(parent or "."):
        return ""
    folders = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()]
    near = did_you_mean(name, folders)
    return near.replace("mean ", f"mean {parent}/", 1) if parent else near


def _is_file(url: str) -> bool:
    parent, _, name = url.rstrip("/").rpartition("/")
    if parent.endswith(":/"):  # the URL is a bucket
        return False
    beside = {storage.base(entry.url): entry for entry in storage.entries(parent or ".")}
    return name in beside and not beside[name].is_folder


def _files(folder: str, role: str, name: str, found: Mapping[str, Entry]) -> tuple[Entry, ...]:
    """The files of a source `x`: the file `x.parquet`, or those in a folder `x` or, as Spark names it, `x.parquet`."""
    if f"{name}/{UNFINISHED}" in found:
        raise DataError(
            f"{storage.join(folder, name)} is not complete: `python -m fusion.prepare` was stopped while it wrote it",
            "run that command again, with the same arguments",
        )
    single = found.get(f"{name}{_PARQUET}")
    folders = {of: _parts(of, found) for of in (f"{name}/", f"{name}{_PARQUET}/")}
    choices: dict[str, tuple[Entry, ...]] = {f"{name}{_PARQUET}": (single,)} if single else {}
    choices |= {of: parts for of, parts in folders.items() if parts}
    if len(choices) > 1:
        both = " and ".join(f"{folder}/{choice}" for choice in choices)
        raise DataError(f"there are {both} for the role {role}", "remove the wrong one")
    if not choices:
        raise _no_source(folder, role, name, found)
    return next(iter(choices.values()))


def _parts(folder: str, found: Mapping[str, Entry]) -> tuple[Entry, ...]:
    """The Parquet files directly in a folder, without hidden ones (`.x`, `_x`, and `._x` of macOS)."""
    names = {path.removeprefix(folder): entry for path, entry in found.items() if path.startswith(folder)}
    mine = [name for name in names if name.endswith(_PARQUET) and "/" not in name and name[0] not in "._"]
    return tuple(names[name] for name in sorted(mine))


def _names(found: Mapping[str, Entry]) -> set[str]:
    """Names of sources: of files `x.parquet`, and of folders that contain Parquet files."""
    paths = [path.split("/") for path in found if path.endswith(_PARQUET)]
    mine = [parts for parts in paths if len(parts) in (1, 2) and all(part[0] not in "._" for part in parts)]
    return {parts[0].removesuffix(_PARQUET) for parts in mine}


def _no_source(folder: str, role: str, name: str, found: Mapping[str, Entry]) -> DataError:
    there = sorted(_names(found))
    near = did_you_mean(name, there)
    flag = f"name the source with --sources.{role.replace('_', '-')} NAME"
    target = f"{folder}/{name}{_PARQUET}"
    if f"{name}.npy" in found:
        flag = f"convert it: `python -m fusion.convert --embeddings {folder}/{name}.npy --ids IDS.npy --to {target}`"
    elif any(path.endswith((".npy", ".npz", ".pkl")) for path in found):
        flag = f"convert NumPy files and pickles with python -m fusion.convert, or {flag}"
    return DataError(
        f"no {target} and no {name}/*{_PARQUET} for the role {role}; {folder} holds {', '.join(there) or 'nothing'}",
        near + (flag if storage.base(folder) == "train" else "add the source: the model was trained with it"),
    )
