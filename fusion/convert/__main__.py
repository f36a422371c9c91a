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
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from fusion.command import guarded
from fusion.command.parser import command_parser
from fusion.convert import safe_pickle
from fusion.convert.arrays import PAIR, Embeddings, embeddings_of, ids_of
from fusion.convert.fetch import fetch
from fusion.convert.numpy_file import read_npy
from fusion.convert.parquet_file import write
from fusion.errors import DataError, ExitCode, filled
from fusion.storage.scratch import temporary_folder

_PICKLE_LAYOUT: Final = "save a dict: {'embeddings': array of (rows, dim), 'sample_ids': list of ids}"


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
        raise DataError(f"{name} has {len(keys)} rows, {ids_name} has {len(wanted)} ids", PAIR)
    rows = dict(zip(keys, vectors.values(), strict=True))
    lacking = [id_ for id_ in wanted if id_ not in rows]
    if lacking:
        raise DataError(f"{name} lacks {len(lacking)} ids of {ids_name}, first {lacking[:5]}", PAIR)
    return [rows[id_] for id_ in wanted], wanted


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
