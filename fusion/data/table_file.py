"""A table's file, CSV or Parquet, as an Arrow table: the columns that are needed, ids as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fusion.data.text_hashes import text_hashes
from fusion.errors import DataError

BLOCK_BYTES = 1 << 24  # parsed at a time; a row has to fit into one block
SEPARATORS = ";\t|"  # what stands between columns in files that are called CSV and are none

Wanted = Callable[[Sequence[str]], list[str]]
# Names of columns, or what chooses them from the names of all columns of a file.
Columns = Collection[str] | Callable[[Sequence[str]], Collection[str]]


def parse_table(
    url: str, content: bytes, needed: Sequence[str], columns: Columns | None, hashed: Collection[str] = ()
) -> tuple[pa.Table, tuple[str, ...]]:
    """The columns `needed`, those of `columns` and `hashed` that exist, and the names of all columns.

    CSV is text as written: an id such as 007 stays 007, and "NA" is a text. Text is of type large_string.

    Args:
        columns: all columns if None.
        hashed: columns of which only the hashes are kept, [N] uint64 as of `text_hashes`: block by block, so that
            their texts are never in memory together.

    Raises:
        DataError: unreadable, a needed column is missing, or its type is of no use.
    """
    hashed = set(hashed).difference(needed)

    def wanted(names: Sequence[str]) -> list[str]:
        _check_columns(url, names, needed)
        chosen = columns(names) if callable(columns) else columns
        kept = names if chosen is None else {*needed, *chosen, *hashed}
        return [name for name in names if name and name in kept]

    if not content:
        raise _unreadable(url, "the file is empty")
    parse = _parse_parquet if url.endswith(".parquet") else _parse_csv
    try:
        found, names = parse(content, wanted, hashed)
        return _typed(url, found, needed), tuple(name for name in names if name)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(url, str(error).splitlines()[0]) from error


def _unreadable(url: str, reason: str) -> DataError:
    return DataError(f"{url} cannot be read: {reason}", "write it again as UTF-8 CSV or as Parquet")


def _check_columns(url: str, names: Sequence[str], needed: Sequence[str]) -> None:
    for column in needed:
        if names.count(column) > 1:
            raise DataError(f"{url} has {names.count(column)} columns {column!r}", "keep one of them")
        if column in names:
            continue
        for separator in SEPARATORS:
            if column in names[0].split(separator):
                message = f"columns of {url} are separated by {separator!r}, expected ','"
                raise DataError(message, "write it with commas, or as Parquet")
        raise DataError(f"{url} has no column {column!r}; it has {list(names)}", "add or rename the column")


def _parse_parquet(content: bytes, wanted: Wanted, hashed: Collection[str]) -> tuple[pa.Table, list[str]]:
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        names = file.schema_arrow.names
        keep = wanted(names)
        found = file.read(columns=[name for name in keep if name not in hashed])
        for name in set(keep).intersection(hashed):
            blocks = [text_hashes(block.column(0)) for block in file.iter_batches(columns=[name])]
            found = found.append_column(name, pa.chunked_array(blocks, pa.uint64()))
        return found, names


def _parse_csv(content: bytes, wanted: Wanted, hashed: Collection[str]) -> tuple[pa.Table, list[str]]:
    with _open_csv(content) as reader:
        names = reader.schema.names
    keep = wanted(names)
    try:
        return _read_csv(content, keep, hashed), names
    except pa.ArrowInvalid as error:
        found = _read_with_trailing_comma(content, names, keep, hashed)
        if found is None:
            raise error
        return found, names


def _open_csv(content: bytes) -> pacsv.CSVStreamingReader:
    """The file up to its first block, whose names are wanted; wrong rows are found when it is read."""
    return pacsv.open_csv(
        pa.BufferReader(content),
        read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda _: "skip"),
    )


def _read_csv(content: bytes, keep: list[str], hashed: Collection[str], **header: Any) -> pa.Table:
    with pacsv.open_csv(
        pa.BufferReader(content),
        # On one thread, an error names the row, and no blocks lie in memory read ahead.
        read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, **header),
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            include_columns=keep, column_types=dict.fromkeys(keep, pa.large_string()), strings_can_be_null=False
        ),
    ) as reader:
        blocks = [_with_hashes(pa.Table.from_batches([block]), hashed) for block in reader]
        return pa.concat_tables(blocks or [_with_hashes(reader.schema.empty_table(), hashed)])


def _with_hashes(block: pa.Table, hashed: Collection[str]) -> pa.Table:
    """The block with hashes in the place of the texts of these columns."""
    for position, name in enumerate(block.column_names):
        if name in hashed:
            block = block.set_column(position, name, pa.array(text_hashes(block.column(position))))
    return block


def _read_with_trailing_comma(
    content: bytes, names: list[str], keep: list[str], hashed: Collection[str]
) -> pa.Table | None:
    """The table if every row ends with one comma more than the header has; else None."""
    try:
        found = _read_csv(content.lstrip(), [*keep, ""], hashed, column_names=[*names, ""], skip_rows=1)
    except pa.ArrowInvalid:
        return None
    is_empty = pc.all(pc.equal(found[""], "")).as_py()
    return found.drop_columns("") if is_empty else None


def _typed(url: str, found: pa.Table, needed: Sequence[str]) -> pa.Table:
    """Text as large_string, whose columns may be larger than 2 GiB, and ids as text."""
    for position, field in enumerate(found.schema):
        if field.name == "sample_id":
            found = found.set_column(position, field.name, id_texts(url, found.column(position)))
        elif field.name == "price" and field.name in needed:
            found = found.set_column(position, field.name, _price_column(url, found.column(position)))
        elif _is_text(field.type):
            found = found.set_column(position, field.name, _texts(found.column(position)))
    return found


def id_texts(url: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as large_string; nulls stay.

    Raises:
        DataError: they are neither whole numbers nor text.
    """
    if pa.types.is_integer(column.type) or _is_text(column.type):
        return _texts(column)
    raise DataError(
        f"column 'sample_id' of {url} is {column.type}, expected int64 or string",
        "write ids as whole numbers or as text",
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type) or bool(pa.types.is_integer(kind.value_type))
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    # Spark and others write UTF-8 as bytes.
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*texts, *binaries))


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_string())


def _price_column(url: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if any(is_number(kind) for is_number in numbers):
        return column
    if _is_text(kind):
        return _texts(column)
    raise DataError(f"column 'price' of {url} is {kind}, expected numbers", "write prices as numbers")
