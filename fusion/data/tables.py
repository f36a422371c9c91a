"""Reads and checks `train.csv` and `test.csv` (or Parquet): ids, prices and the columns that a command needs.

Columns are stored in Arrow's memory, where a text takes only its bytes, without a Python object.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fusion import log, storage
from fusion.data.inputs import find_table
from fusion.data.table_file import Columns, parse_table, typed_rows
from fusion.data.text_order import text_order
from fusion.errors import DataError, did_you_mean
from fusion.storage import Entry

# Below this number of rows, there is a warning. A fifth of 500 rows validates; as SMAPE varies by about 40 points
# between rows, the mean over 100 rows has a standard error of 4 points.
FEW_ROWS = 500
NO_ID = pa.array(["", "nan", "None", "<NA>"], pa.large_string())  # how tools write a missing id


@dataclass(frozen=True)
class Table:
    """Rows sorted by `sample_id`, so that the order of rows in the file only matters for a submission's order.

    Attributes:
        frame: one row per sample, with the index `sample_id` (text, as written), the requested columns, and price as
            float64 if the table must have prices.
        file_order: [N] for each row of the file, in its order, the position in `frame`.
        columns: names of all columns of the file.
        name: name of the file, for messages.
    """

    frame: pd.DataFrame
    file_order: np.ndarray
    columns: tuple[str, ...] = ()
    name: str = "train.csv"

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def ids(self) -> pd.Index:
        return self.frame.index

    @property
    def prices(self) -> np.ndarray:
        """[N] float64, dollars."""
        return self.frame["price"].to_numpy(np.float64)

    def digest(self) -> str:
        """sha256 of ids and prices. It depends on the rows alone, not on the file's format or order."""
        total = self._hash_of_ids()
        total.update(np.ascontiguousarray(self.prices).data)
        return total.hexdigest()

    def ids_digest(self) -> str:
        """sha256 of the ids alone."""
        return self._hash_of_ids().hexdigest()

    def _hash_of_ids(self) -> hashlib._Hash:
        ids = _large_string(self.ids)
        total = hashlib.sha256(pc.binary_length(ids).to_numpy().tobytes())
        _, offsets, texts = ids.buffers()
        first, *_, last = np.frombuffer(offsets, np.int64)[[ids.offset, ids.offset + len(ids)]]
        total.update(memoryview(texts)[first:last])
        return total

    def column(self, name: str, flag: str) -> pd.Series:
        """[N] values of a column that the user named with `flag`.

        Raises:
            DataError: the file has no such column.
        """
        if name not in self.frame.columns:
            raise DataError(
                f"{self.name} has no column {name!r}; it has {list(self.columns)}",
                f"{did_you_mean(name, self.columns)}correct {flag}",
            )
        return self.frame[name]


def positions_of(ids: pd.Index, among: pd.Index) -> np.ndarray:
    """[n] positions of these ids in another index of distinct ids; -1 for an id that it does not contain.

    As `pd.Index.get_indexer`, which would create a Python object per id.
    """
    found = pc.index_in(_large_string(ids), value_set=_large_string(among))
    return np.asarray(found.fill_null(-1).to_numpy(), np.int64)


def _large_string(ids: pd.Index) -> pa.Array:
    array = pa.array(ids, pa.large_string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def read_table(
    data: str,
    split: str,
    *,
    priced: bool,
    drop_bad_prices: bool = False,
    columns: Columns | None = None,
    hashed: Collection[str] = (),
) -> Table:
    """Reads the table of a split.

    Args:
        priced: whether the table must have prices.
        drop_bad_prices: whether to drop rows without a positive price instead of failing.
        columns: columns to keep beside ids and prices, if the file has them; all by default.
        hashed: columns of which only hashes are kept, uint64, with 0 for a missing text (see `text_hashes`).

    Raises:
        DataError: there is no such file, it is unreadable, a column is missing or has an unusable type, ids are missing
            or occur twice, or prices are missing or not positive.
    """
    files = find_table(data, split)
    url = files[0].url if len(files) == 1 else files[0].url.rpartition("/")[0]  # a file, or the folder of its parts
    return read_files(files, url, priced=priced, drop_bad_prices=drop_bad_prices, columns=columns, hashed=hashed)


def read_files(
    files: Sequence[Entry],
    url: str,
    *,
    priced: bool,
    drop_bad_prices: bool = False,
    columns: Columns | None = None,
    hashed: Collection[str] = (),
) -> Table:
    """As `read_table`, of a table whose files are known; `url` names it in messages."""
    needed = ("sample_id", "price") if priced else ("sample_id",)
    found, names = _read_parts([entry.url for entry in files], needed, columns, hashed)
    if found.num_rows == 0:
        raise DataError(f"{url} has no rows", "write at least one row with a sample_id")
    if priced:
        found = _with_prices(url, found, drop_bad_prices)
    table = _sorted(url, found, names)
    del found
    # Parsing needs several times the memory of the table. Without this call, the process would keep it.
    pa.default_memory_pool().release_unused()
    return table


def table_of(
    rows: pa.Table,
    name: str,
    *,
    priced: bool,
    drop_bad_prices: bool = False,
    columns: Collection[str] | None = None,
) -> Table:
    """As `read_table`, of rows in memory; `name` names them in messages."""
    needed = ("sample_id", "price") if priced else ("sample_id",)
    found = typed_rows(rows, name, needed, columns)
    if found.num_rows == 0:
        raise DataError(f"{name} has no rows", "give at least one row with a sample_id")
    if priced:
        found = _with_prices(name, found, drop_bad_prices)
    return _sorted(name, found, tuple(rows.column_names))


def _read_parts(
    urls: Sequence[str], needed: Sequence[str], columns: Columns | None, hashed: Collection[str]
) -> tuple[pa.Table, tuple[str, ...]]:
    """The rows of all files of a table, and the names of its columns, which all files must share."""
    found, names = parse_table(urls[0], storage.read(urls[0]), needed, columns, hashed)
    parts = [found]
    for url in urls[1:]:
        part, _ = parse_table(url, storage.read(url), needed, columns, hashed)
        if part.schema != found.schema:
            raise DataError(
                f"{url} has the columns {_described(part)}, {urls[0]} has {_described(found)}",
                "write all parts of the table with the same columns",
            )
        parts.append(part)
    return pa.concat_tables(parts), names


def _described(part: pa.Table) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in part.schema)


def _sorted(url: str, found: pa.Table, names: tuple[str, ...]) -> Table:
    ids = found["sample_id"].combine_chunks()
    n_empty = int(pc.sum(pc.is_in(ids, value_set=NO_ID)).as_py() or 0) + ids.null_count
    if n_empty:
        raise DataError(f"{url} has {n_empty} rows without a sample_id", "give every row an id")
    order = pa.array(text_order(ids))
    ids = ids.take(order)
    if pc.any(pc.equal(ids[1:], ids[:-1])).as_py():  # equal ids are neighbours now
        report_duplicates(url, ids)
    file_order = np.empty(len(order), np.int64)
    file_order[order.to_numpy()] = np.arange(len(order))
    others = found.drop_columns("sample_id").take(order).combine_chunks()
    frame = others.to_pandas(ignore_metadata=True).set_axis(_index(ids))
    return Table(frame, file_order, names, storage.base(url))


def _index(ids: pa.Array) -> pd.Index:
    index: pd.Index = pd.Index(pa.chunked_array([ids]).to_pandas(), name="sample_id")
    return index


def warn_of_poor_prices(table: Table) -> None:
    """Warns of a training table from which a model can learn little: it has few rows, or a single price."""
    if len(table) < FEW_ROWS:
        reason = "with so few validation rows, chance moves scores by several points"
        log.warning(event="few_rows", rows=len(table), reason=reason)
    if len(np.unique(table.prices)) == 1:
        log.warning(event="one_price", price=float(table.prices[0]), reason="every row has the same price")


def report_duplicates(origin: str, ids: pa.Array | pa.ChunkedArray) -> None:
    """Raises a DataError with the number and the first of the ids that occur more than once, if any do."""
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise DataError(
            f"{len(repeated)} ids occur more than once in {origin}, the first: {', '.join(repeated[:5].to_pylist())}",
            "keep one row for each id",
        )


def _with_prices(url: str, found: pa.Table, drop: bool) -> pa.Table:
    """The rows with a positive price, with prices as float64."""
    column = found["price"]
    prices = _numbers(column)
    good = np.isfinite(prices) & (prices > 0)
    position = found.schema.get_field_index("price")
    found = found.set_column(position, "price", pa.chunked_array([prices]))
    if good.all():
        return found
    bad = np.flatnonzero(~good)
    if len(bad) == len(good) or not drop:
        raise DataError(*_bad_prices(url, found["sample_id"].take(bad[:5]), column.take(bad[:5]), len(bad), len(good)))
    log.warning(event="dropped_bad_prices", rows=len(bad), file=url)
    return found.filter(pa.array(good))


def _bad_prices(url: str, ids: pa.ChunkedArray, prices: pa.ChunkedArray, n_bad: int, n_rows: int) -> tuple[str, str]:
    """Message and hint for rows without a positive price."""
    shown = ", ".join(f"{one} ({price!r})" for one, price in zip(ids.to_pylist(), prices.to_pylist(), strict=True))
    is_text = any(isinstance(price, str) and any(map(str.isdigit, price)) for price in prices.to_pylist())
    is_text = is_text and not np.isfinite(_numbers(prices)).any()
    reason = "have a price that is not a plain number" if is_text else "have no price above zero"
    message = f"{n_bad} of {n_rows} rows of {url} {reason}, the first: {shown}"
    remedy = "write prices as plain numbers such as 12.99, without currency and with a decimal point"
    if n_bad == n_rows:  # dropping them would leave nothing
        return message, remedy
    return message, f"{remedy if is_text else 'correct them'}, or drop them with --drop-bad-prices"


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """[N] float64; NaN for values that are not numbers."""
    if not pa.types.is_large_string(column.type):
        return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)
    text = pc.utf8_trim_whitespace(column)
    try:
        return np.asarray(text.cast(pa.float64()).to_numpy(), np.float64)
    except pa.ArrowInvalid:  # some are not numbers; pandas is slower, but marks which ones
        numbers: pd.Series = pd.to_numeric(text.to_pandas(), errors="coerce")
        return np.asarray(numbers, np.float64)
