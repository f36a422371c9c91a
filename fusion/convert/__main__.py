"""Converts embeddings of the original tools (pairs of `.npy` files, or pickles) to the layout that training reads.

    python -m fusion.convert --embeddings image_embeddings.npy --ids sample_ids.npy \\
        --to s3://bucket/data/embeddings/train/clip_image.parquet
    python -m fusion.convert --pickle embeddings.pkl --to data/embeddings/train/qwen.parquet

A SigLIP folder contains two sources, so it takes two commands. Use image_sample_ids.npy for both if there is no other
file of ids:

    python -m fusion.convert --embeddings siglip/image_embeddings.npy --ids siglip/image_sample_ids.npy \\
        --to data/embeddings/train/siglip_image.parquet
    python -m fusion.convert --embeddings siglip/text_embeddings.npy --ids siglip/text_sample_ids.npy \\
        --to data/embeddings/train/siglip_text.parquet

Pickles are parsed as data; nothing in them is executed (see fusion.convert.safe_pickle). This needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from fusion import storage
from fusion.command import guarded
from fusion.command.parser import command_parser
from fusion.convert import safe_pickle
from fusion.convert.numpy_file import read_npy
from fusion.errors import DataError, ExitCode, UsageError, filled
from fusion.storage.scratch import temporary_folder

ROW_GROUP: Final = 8192  # rows per row group of Parquet: enough for few requests, few enough to read in parallel
_STACK_IDS: Final = "save the ids as one array of integers, or of text: np.save('ids.npy', ids.astype(str))"
_PAIR: Final = "give embeddings and ids that were written together"
_PICKLE_LAYOUT: Final = "save a dict: {'embeddings': array of (rows, dim), 'sample_ids': list of ids}"
_STACK_ROWS: Final = "save the embeddings as one array of float16 or float32 with one row per sample"


@dataclass(frozen=True)
class Embeddings:
    """Ids with their vectors.

    Attributes:
        ids: [n] int64 or string.
        vectors: an array of shape (n, dim), or a list of n arrays of length dim.
        dtype: in which the vectors are stored.
    """

    ids: pa.Array
    vectors: NDArray[Any] | list[NDArray[Any]]
    dim: int
    dtype: np.dtype[Any]

    def batch(self, start: int) -> pa.RecordBatch:
        """A row group's rows from `start` on. DataError if a float64 is too large for float32."""
        rows = slice(start, start + ROW_GROUP)
        try:
            with np.errstate(over="raise"):  # training would treat an infinite value as a missing embedding
                values = np.ascontiguousarray(self.vectors[rows], dtype=self.dtype)
        except FloatingPointError:
            raise DataError(f"a value from row {start} on is too large for float32", "scale the embeddings") from None
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self.dim)
        return pa.record_batch([self.ids[rows], column], names=["sample_id", "embedding"])


def embeddings_of(vectors: object, ids: object, name: str, ids_name: str) -> Embeddings:
    """Checks vectors and ids, and pairs them by position. `name` and `ids_name` are their names in errors.

    Raises:
        DataError: one of them is invalid, or their numbers differ.
    """
    id_column = ids_of(ids, ids_name)
    rows, dtypes, dim = rows_of(vectors, name)
    if len(rows) != len(id_column):
        raise DataError(f"{name} has {len(rows)} rows, {ids_name} has {len(id_column)} ids", _PAIR)
    found = np.result_type(*dtypes)
    return Embeddings(id_column, rows, dim, np.dtype(np.float16 if found == np.float16 else np.float32))


def rows_of(value: object, name: str) -> tuple[NDArray[Any] | list[NDArray[Any]], set[np.dtype[Any]], int]:
    """Vectors, their dtypes and their length, from an array (n, dim) or a list of n vectors or of batches (b, dim)."""
    value = safe_pickle.unwrap(value, name)
    if not isinstance(value, list):
        array = _numeric(value, name, n_dims=(2,))
        return array, {array.dtype}, array.shape[1]
    if not value:
        raise DataError(f"{name} is empty", _STACK_ROWS)
    rows = [row for i, item in enumerate(value) for row in _vectors(item, f"{name}[{i}]")]
    dim = len(rows[0])
    ragged = next((i for i, row in enumerate(rows) if len(row) != dim), None)
    if ragged is not None:
        raise DataError(f"{name}: row 0 has length {dim}, row {ragged} has {len(rows[ragged])}", _STACK_ROWS)
    return rows, {row.dtype for row in rows}, dim


def _vectors(item: object, name: str) -> NDArray[Any]:
    return np.atleast_2d(_numeric(safe_pickle.unwrap(item, name), name, n_dims=(1, 2)))


def _numeric(value: object, name: str, n_dims: tuple[int, ...]) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError:  # numpy on nested lists of unequal lengths
        raise DataError(f"{name} is ragged: its rows have different lengths", _STACK_ROWS) from None
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} has dtype {array.dtype}, expected numbers", _STACK_ROWS)
    if array.ndim not in n_dims or 0 in array.shape:
        expected = "(rows, dim)" if n_dims == (2,) else "(dim,) or (rows, dim)"
        raise DataError(f"{name} has shape {array.shape}, expected {expected} without a 0", _STACK_ROWS)
    return array


def ids_of(value: object, name: str) -> pa.Array:
    """Ids as int64 or string, from an array of shape (n,) or (n, 1), or from a list.

    Raises:
        DataError: they are not integers or text, or an id occurs twice.
    """
    value = safe_pickle.unwrap(value, name)
    if not isinstance(value, np.ndarray | list | tuple):
        raise DataError(f"{name} is a {type(value).__name__}, expected a list or an array of ids", _STACK_IDS)
    try:
        ids = _id_array(value, name) if isinstance(value, np.ndarray) else _id_list(value, name)
    except (OverflowError, UnicodeError, pa.ArrowException) as error:
        raise DataError(f"{name} has an id that is neither int64 nor UTF-8 text ({error})", _STACK_IDS) from None
    _require_unique(ids, name)
    return ids


def _id_array(array: NDArray[Any], name: str) -> pa.Array:
    if array.shape not in ((array.size,), (array.size, 1)):
        raise DataError(f"{name} has shape {array.shape}, expected (rows,)", _STACK_IDS)
    if array.dtype.kind not in "iuUS":
        raise DataError(f"{name} has dtype {array.dtype}, expected integers or text", _STACK_IDS)
    flat = np.char.decode(array.ravel(), "utf-8") if array.dtype.kind == "S" else array.ravel()
    if flat.dtype.kind == "U":
        return pa.array(flat.tolist(), pa.string())
    return pa.array(flat.astype(flat.dtype.newbyteorder("="))).cast(pa.int64())  # raises where uint64 does not fit


def _id_list(values: Sequence[object], name: str) -> pa.Array:
    ids = [_id_scalar(value, name) for value in values]
    kinds = [type(value) for value in ids]
    odd = next((i for i, kind in enumerate(kinds) if kind not in (int, str) or kind is not kinds[0]), None)
    if odd is not None:
        raise DataError(f"{name}[{odd}] is a {kinds[odd].__name__}, expected only integers or only text", _STACK_IDS)
    return pa.array(ids, pa.string() if str in kinds else pa.int64())


def _id_scalar(value: object, name: str) -> object:
    """The id of an element: `tensor(1)` and `array([1])` give 1, rather than the text of their repr."""
    value = safe_pickle.unwrap(value, name)
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value


def _require_unique(ids: pa.Array, name: str) -> None:
    counts = ids.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        first = ", ".join(str(value) for value in repeated[:5].to_pylist())
        raise DataError(f"{name} has {len(repeated)} ids more than once, first {first}", "keep one row for each id")


def read_pickle(path: Path, name: str) -> Embeddings:
    """Reads a pickled dict with `embeddings` and `sample_ids`.

    If `embeddings` is itself a dict from id to vector, `sample_ids` is optional.
    """
    root = safe_pickle.load(path, name)
    if not isinstance(root, dict):
        raise DataError(f"{name} holds a {type(root).__name__}, expected a dict", _PICKLE_LAYOUT)
    vectors, ids = root.get("embeddings"), root.get("sample_ids")
    if vectors is None or (ids is None and not isinstance(vectors, dict)):
        missing = "embeddings" if vectors is None else "sample_ids"
        raise DataError(f"{name} has no {missing!r}, found keys {[str(key) for key in list(root)[:9]]}", _PICKLE_LAYOUT)
    vectors_name, ids_name = f"{name}: embeddings", f"{name}: sample_ids"
    if isinstance(vectors, dict):
        vectors, ids = _by_id(vectors, ids, vectors_name, ids_name)
    return embeddings_of(vectors, ids, vectors_name, ids_name)


def _by_id(vectors: dict[object, object], ids: object, name: str, ids_name: str) -> tuple[list[object], list[object]]:
    """The vectors and ids of a dict from id to vector, in the order of `ids`, or of the dict if `ids` is None."""
    keys = ids_of(list(vectors), name).to_pylist()
    if ids is None:
        return list(vectors.values()), keys
    wanted = ids_of(ids, ids_name).to_pylist()
    if len(keys) != len(wanted):
        raise DataError(f"{name} has {len(keys)} rows, {ids_name} has {len(wanted)} ids", _PAIR)
    rows = dict(zip(keys, vectors.values(), strict=True))
    lacking = [id_ for id_ in wanted if id_ not in rows]
    if lacking:
        raise DataError(f"{name} lacks {len(lacking)} ids of {ids_name}, first {lacking[:5]}", _PAIR)
    return [rows[id_] for id_ in wanted], wanted


def _open_store(url: str) -> tuple[Any, str]:
    try:
        store, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"{url} is not a usable URL ({error})", "give a path, or a URL such as s3://bucket/a"
        ) from None
    return store, path


def fetch(url: str, scratch: Path) -> Path:
    """A local file with the content of `url`: the file itself if it is local, else a copy in `scratch`."""
    store, path = _open_store(url)
    local = Path(path)
    if not isinstance(store, LocalFileSystem):
        local = scratch / uuid4().hex
        storage.retrying(url, lambda: store.get_file(path, str(local)))
    if not local.is_file():
        raise DataError(f"{url} is not a file that exists", "check the path")
    return local


def write(embeddings: Embeddings, url: str, scratch: Path) -> None:
    """Writes a Parquet file to `url` atomically: a kill at any moment leaves the complete file, or none."""
    store, path = _open_store(url)
    if isinstance(store, LocalFileSystem):
        storage.retrying(url, lambda: _write_local(embeddings, Path(path)))
        return
    # Uploading a complete file is atomic. If the file were written to the store piece by piece, then closing it after
    # an error would commit an incomplete file.
    whole = scratch / "converted.parquet"
    _write_local(embeddings, whole)
    storage.retrying(url, lambda: store.put_file(str(whole), path))


def _write_local(embeddings: Embeddings, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")  # a rename is only atomic within a file system
    try:
        _write_parquet(embeddings, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(embeddings: Embeddings, path: Path) -> None:
    schema = embeddings.batch(0).schema
    plain = {"compression": "none", "use_dictionary": False}  # embeddings hardly compress
    with path.open("wb") as file, pq.ParquetWriter(file, schema, **plain) as writer:
        for start in range(0, len(embeddings.ids), ROW_GROUP):
            writer.write_batch(embeddings.batch(start), row_group_size=ROW_GROUP)
        writer.close()
        os.fsync(file.fileno())  # otherwise a crash after the rename could leave an empty or incomplete file


def convert(arguments: argparse.Namespace) -> str:
    """Converts as the arguments say, and returns a line that describes what was written. Raises FusionError."""
    with TemporaryDirectory(prefix="fusion-convert-", dir=temporary_folder()) as folder:
        scratch = Path(folder)
        if arguments.pickle:
            found = read_pickle(fetch(arguments.pickle, scratch), arguments.pickle)
        else:
            vectors = read_npy(fetch(arguments.embeddings, scratch), arguments.embeddings)
            ids = read_npy(fetch(arguments.ids, scratch), arguments.ids)
            found = embeddings_of(vectors, ids, arguments.embeddings, arguments.ids)
        write(found, arguments.to, scratch)
    return f"wrote {len(found.ids)} rows of {found.dim} {found.dtype} to {arguments.to}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    example = "--embeddings x.npy --ids ids.npy --to data/embeddings/train/clip_image.parquet"
    paths = "FILE and URL are paths or fsspec URLs; objects of a store pass through a temporary folder (TMPDIR)."
    parser = command_parser("python -m fusion.convert", __doc__, example, epilog=paths)
    parser.add_argument("--embeddings", metavar="FILE", help=".npy with an array (rows, dim); needs --ids")
    parser.add_argument("--ids", metavar="FILE", help=".npy with the sample ids of these rows, in their order")
    parser.add_argument("--pickle", metavar="FILE", help="pickle or torch.save of a dict: embeddings, sample_ids")
    parser.add_argument(
        "--to", metavar="URL", type=filled("--to"), required=True, help="the .parquet to write; replaced if it exists"
    )
    arguments = parser.parse_args(argv)
    if bool(arguments.embeddings) != bool(arguments.ids) or bool(arguments.pickle) == bool(arguments.ids):
        parser.error("expected either --embeddings with --ids, or --pickle")
    if not arguments.to.endswith(".parquet"):
        parser.error(f"--to {arguments.to}: expected a name that ends with .parquet")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. `--help` raises SystemExit, as in argparse."""

    def job() -> ExitCode:
        print(convert(_parse(argv)))
        return ExitCode.DONE

    return guarded(job)


if __name__ == "__main__":
    sys.exit(main())
