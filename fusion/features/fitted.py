"""The computed sources of a run: terms of texts, quantities in texts, and columns that the user names.

They are fitted once per run, on the texts and columns of its training rows, and never on prices. They are stored in the
run's folder as `features.safetensors`. A resumed training, an evaluation and a prediction read that file instead of
fitting again, so that all of them compute the same vectors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fusion import log, storage
from fusion.config import RunConfig
from fusion.data.duplicates import TEXT_COLUMN
from fusion.data.tables import Table
from fusion.data.text_hashes import as_texts, mix_bits, text_hashes
from fusion.errors import DataError
from fusion.features import columns as features_columns
from fusion.features import quantities, tfidf
from fusion.features.columns import COLUMNS, Column
from fusion.features.terms import KINDS
from fusion.features.tfidf import Space, shortened
from fusion.records.manifests import FEATURES, safetensors_metadata
from fusion.records.run import RunFolder

# Column to [n] large_string without nulls, for all rows or a chunk of them.
Columns = Mapping[str, pa.Array]
# Role to vectors [n, D] float32, and whether the row has the role, [n] bool.
Vectors = dict[str, tuple[np.ndarray, np.ndarray]]

_REMEDY = "restore it, or train under another --run-id"


@dataclass(frozen=True)
class Features:
    """The fitted computed sources of a run.

    Attributes:
        text_column: the column of texts; empty if texts are not used.
        spaces: the fitted TF-IDF spaces, one for each kind of terms that occurs in the training texts.
        columns: the fitted columns.
    """

    text_column: str
    spaces: tuple[Space, ...]
    columns: tuple[Column, ...]

    @property
    def dims(self) -> dict[str, int]:
        """Role to dimension, in the model's order."""
        dims = {f"text_{space.kind}": tfidf.DIM for space in self.spaces}
        if self.text_column:
            dims["text_numbers"] = quantities.DIM
        return dims | ({"columns": sum(column.dim for column in self.columns)} if self.columns else {})

    @property
    def names(self) -> list[str]:
        """Names of the columns of a table that are needed."""
        return [*([self.text_column] if self.text_column else []), *(column.name for column in self.columns)]

    def vectors(self, rows: Columns, where: str) -> Vectors:
        """The vectors of these rows. Each depends on its row alone.

        Args:
            where: name of the file, for messages.

        Raises:
            DataError: a column has values of another type than in training.
        """
        found: Vectors = {}
        if self.text_column:
            texts = shortened(rows[self.text_column])
            found = {f"text_{space.kind}": space.vectors(texts) for space in self.spaces}
            has_text = pc.not_equal(pc.utf8_trim_whitespace(texts), "").to_numpy(zero_copy_only=False)
            found["text_numbers"] = quantities.quantities(texts), has_text
        if self.columns:
            values = [column.vectors(rows[column.name], where) for column in self.columns]
            is_missing = [features_columns.missing(rows[column.name]) for column in self.columns]
            found["columns"] = np.concatenate(values, axis=1), ~np.all(is_missing, axis=0)
        return found


def read_columns(config: RunConfig) -> list[str]:
    """Names of the columns that the settings' computed sources need."""
    return [*([config.text_column or TEXT_COLUMN] if config.features else []), *config.columns]


def training_columns(config: RunConfig, table: Table) -> Columns:
    """The columns from which sources are computed, by name, for all rows [N] of the training table.

    Raises:
        DataError: a column is missing.
    """
    if config.features and config.text_column is None and TEXT_COLUMN not in table.frame.columns:
        raise DataError(
            f"{table.name} has no column {TEXT_COLUMN!r}, which --features text needs; it has {list(table.columns)}",
            "name the column of texts with --text-column, or leave out --features",
        )
    flags = dict.fromkeys(config.columns, "--columns")
    return {name: _texts(table, name, flags.get(name, "--text-column")) for name in read_columns(config)}


def columns_of(features: Features | None, table: Table) -> Columns:
    """The same for another table than that of the training; empty without features.

    Raises:
        DataError: a column that the model was trained with is missing.
    """
    if features is None:
        return {}
    lacking = [name for name in features.names if name not in table.frame.columns]
    if lacking:
        raise DataError(
            f"{table.name} has no column {lacking[0]!r}, which the model was trained with; it has "
            f"{list(table.columns)}",
            "add the column, or train a model without it",
        )
    return {name: _texts(table, name, "") for name in features.names}


def _texts(table: Table, name: str, flag: str) -> pa.Array:
    if table.columns.count(name) > 1:
        raise DataError(f"{table.name} has {table.columns.count(name)} columns {name!r}", "keep one of them")
    column = pa.array(table.column(name, flag))
    column = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
    return pa.concat_arrays(as_texts(column).fill_null("").chunks or [pa.array([], pa.large_string())])


def row_hashes(columns: Columns) -> np.ndarray:
    """[n] uint64 hash of each row's values of these columns."""
    total = np.zeros(len(next(iter(columns.values()))), np.uint64)
    for name in sorted(columns):
        total = mix_bits(total + np.uint64(1)) ^ text_hashes(columns[name])
    return mix_bits(total)


def fit_features(
    config: RunConfig, columns: Columns, prices: np.ndarray, trains: np.ndarray, beat: Callable[[], None]
) -> Features:
    """Fits the computed sources on the training rows.

    Args:
        columns: of all N rows.
        prices: [N]; only used to find out whether a column is a copy of the price.
        trains: [N] bool; the training rows. If all folds validate in one run, these are all rows: then the fit uses
            texts of rows that some members hold out, but no prices.
        beat: called regularly, for the watchdog; it may raise an exception to stop.

    Raises:
        DataError: a column is empty, or is a copy of the price.
    """
    started, rows = time.monotonic(), np.flatnonzero(trains)
    of_training = {name: column.take(rows) for name, column in columns.items()}
    text_column = read_columns(config)[0] if config.features else ""
    spaces: list[Space | None] = []
    if text_column:
        texts = shortened(of_training[text_column])
        spaces = [tfidf.fit(kind, texts, beat) for kind in KINDS]
    fitted = tuple(features_columns.fit(name, of_training[name], prices[rows]) for name in config.columns)
    features = Features(text_column, tuple(space for space in spaces if space), fitted)
    said = ",".join(f"{role}:{dim}" for role, dim in features.dims.items())
    log.info(event="features", rows=len(rows), dims=said, seconds=time.monotonic() - started)
    return features


def to_bytes(features: Features) -> bytes:
    """Serialises the features; equal features give equal bytes."""
    tensors: dict[str, np.ndarray] = {}
    for space in features.spaces:
        tensors |= {f"{space.kind}.terms": space.terms, f"{space.kind}.idf": space.idf}
    facts: dict[str, Any] = {"text_column": features.text_column, "kinds": [space.kind for space in features.spaces]}
    facts["columns"] = [asdict(column) for column in features.columns]
    return save(tensors, {"features": json.dumps(facts, sort_keys=True)})


def from_bytes(content: bytes, url: str) -> Features:
    """Parses what `to_bytes` wrote. Raises a DataError that names `url` if the content is damaged."""
    try:
        tensors = load(content)
        facts = json.loads(safetensors_metadata(content)["features"])
        spaces = tuple(Space(kind, tensors[f"{kind}.terms"], tensors[f"{kind}.idf"]) for kind in facts["kinds"])
        return Features(str(facts["text_column"]), spaces, COLUMNS.validate_python(facts["columns"]))
    except (SafetensorError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{url} is damaged: {str(error).splitlines()[0]}", _REMEDY) from error


def write_features(run: RunFolder, features: Features) -> None:
    storage.write(run.at(FEATURES), to_bytes(features))


def read_features(run: RunFolder, sha256: str = "") -> Features:
    """Reads the computed sources of a run.

    Args:
        sha256: expected sha256 of the file; empty if it is not known.

    Raises:
        DataError: the file does not exist, or is damaged.
    """
    url = run.at(FEATURES)
    content = storage.read_if_exists(url)
    if content is None:
        raise DataError(f"{url} does not exist, but the run needs it to compute sources", _REMEDY)
    if sha256 not in ("", storage.sha256(content)):
        raise DataError(f"{url} is not the one that the run was trained with", _REMEDY)
    return from_bytes(content, url)


def has_features(config: RunConfig) -> bool:
    return bool(config.features or config.columns)
