"""Parses a table's CSV or Parquet file into an Arrow table with the needed columns, and with ids as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fusion.data.text_hashes import text_hashes
from fusion.errors import DataError

BLOCK_BYTES = 1 << 24  # bytes of CSV parsed at a time; pyarrow needs every row to fit into one block
SEPARATORS = ";\t|"  # common column separators other than the comma; only to name the one that was used instead

Wanted = Callable[[Sequence[str]], list[str]]  # from the names of a file's columns to those to read
# Names of columns, or a function that chooses them from the names of all columns of a file.
Columns = Collection[str] | Callable[[Sequence[str]], Collection[str]]


def parse_table(
    url: str, content: bytes, needed: Sequence[str], columns: Columns | None, hashed: Collection[str] = ()
) -> tuple[pa.Table, tuple[str, ...]]:
    """Parses a file. Returns a table of the chosen columns, and the names of all columns of the file.

    Values in CSV stay as written: an id of 007 stays 007, and "NA" is a text. Texts have the type large_string.

    Args:
        needed: columns that the file must have.
        columns: further columns to read if the file has them; None: all.
        hashed: columns of which only hashes are kept, [N] uint64 (see `text_hashes`). They are hashed block by block,
            so that never all of their texts are in memory at once.

    Raises:
        DataError: the file is unreadable, a needed column is missing, or its type cannot be used.
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


def typed_rows(rows: pa.Table, name: str, needed: Sequence[str], columns: Collection[str] | None) -> pa.Table:
    """Rows in memory as `parse_table` returns those of a file; `name` names them in messages.

    Raises:
        DataError: a needed column is missing, or its type cannot be used.
    """
    names = rows.column_names
    _check_columns(name, names, needed)
    kept = names if columns is None else [one for one in names if one in {*needed, *columns}]
    return _typed(name, rows.select(kept), needed)


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
    """Reads the file's first block, to get the names of its columns. Invalid rows are skipped; reading reports them."""
    return pacsv.open_csv(
        pa.BufferReader(content),
        read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda _: "skip"),
    )


def _read_csv(content: bytes, keep: list[str], hashed: Collection[str], **header: Any) -> pa.Table:
    with pacsv.open_csv(
        pa.BufferReader(content),
        # With a single thread, errors name the row, and no further blocks are read ahead into memory.
        read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, **header),
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            include_columns=keep, column_types=dict.fromkeys(keep, pa.large_string()), strings_can_be_null=False
        ),
    ) as reader:
        blocks = [_with_hashes(pa.Table.from_batches([block]), hashed) for block in reader]
        return pa.concat_tables(blocks or [_with_hashes(reader.schema.empty_table(), hashed)])


def _with_hashes(block: pa.Table, hashed: Collection[str]) -> pa.Table:
    """The block, with the texts of these columns replaced by their hashes."""
    for position, name in enumerate(block.column_names):
        if name in hashed:
            block = block.set_column(position, name, pa.array(text_hashes(block.column(position))))
    return block


def _read_with_trailing_comma(
    content: bytes, names: list[str], keep: list[str], hashed: Collection[str]
) -> pa.Table | None:
    """The table, if every row ends with an extra comma that the header lacks; else None."""
    try:
        found = _read_csv(content.lstrip(), [*keep, ""], hashed, column_names=[*names, ""], skip_rows=1)
    except pa.ArrowInvalid:
        return None
    is_empty = pc.all(pc.equal(found[""], "")).as_py()
    return found.drop_columns("") if is_empty else None


def _typed(url: str, found: pa.Table, needed: Sequence[str]) -> pa.Table:
    """Converts ids to text, and all texts to large_string, of which a column may be larger than 2 GiB."""
    for position, field in enumerate(found.schema):
        if field.name == "sample_id":
            found = found.set_column(position, field.name, id_texts(url, found.column(position)))
        elif field.name == "price" and field.name in needed:
            found = found.set_column(position, field.name, _price_column(url, found.column(position)))
        elif _is_text(field.type):
            found = found.set_column(position, field.name, _texts(found.column(position)))
    return found


def id_texts(url: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as large_string; nulls stay null.

    Raises:
        DataError: the ids are neither integers nor text.
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
    # Spark and other tools may write UTF-8 texts as binary.
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
