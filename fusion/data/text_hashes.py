"""64-bit hashes of texts, so that texts can be compared for equality without being kept in memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CHUNK_ROWS = 1 << 13  # texts hashed at a time; 328 MB of text if each has 40,000 letters
WORD = 8  # bytes of a text that are hashed as one 64-bit word


def text_hashes(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """[N] uint64 hashes of the values as trimmed texts; 0 for missing and empty values.

    Different texts have the same hash in about one of 300,000 tables of 10 million rows.
    """
    column = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])
    if not pa.types.is_large_string(column.type):
        column = as_texts(column)
    parts = [_hashes(column.slice(start, CHUNK_ROWS)) for start in range(0, len(column), CHUNK_ROWS)]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def mix_bits(words: np.ndarray) -> np.ndarray:
    """Spreads the bits of each 64-bit word over the whole word, with a round of the finaliser of splitmix64.

    Words often have many constant bits: the low 13 bits of a float16 stored as float32 are zero, for example.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    spread: np.ndarray = words ^ (words >> np.uint64(27))
    return spread


def _hashes(texts: pa.ChunkedArray) -> np.ndarray:
    """[N] uint64 hashes of the trimmed texts; 0 for missing and empty ones.

    A text is cut into words of 8 bytes. Each word is mixed with its position in the text; the hash is their sum plus a
    mix of the text's length.
    """
    trimmed = pa.concat_arrays(pc.utf8_trim_whitespace(texts).fill_null("").chunks)
    _, offsets, letters = trimmed.buffers()
    bounds = np.frombuffer(offsets, np.int64)[trimmed.offset :][: len(trimmed) + 1]
    lengths = np.diff(bounds)
    n_words = -(-lengths // WORD)
    ends = np.cumsum(n_words)
    if not ends[-1]:
        return np.zeros(len(lengths), np.uint64)
    position = np.arange(ends[-1]) - np.repeat(ends - n_words, n_words)  # of each word in its text
    padded = np.concatenate([np.frombuffer(letters, np.uint8)[: bounds[-1]], np.zeros(WORD, np.uint8)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WORD)
    words = windows[np.repeat(bounds[:-1], n_words) + WORD * position].view("<u8")[:, 0]
    # The last word of a text may extend into the next text: these bytes are set to 0.
    n_after = (WORD - (np.repeat(lengths, n_words) - WORD * position)).clip(0)
    words &= np.uint64(2**64 - 1) >> (8 * n_after).astype(np.uint64)
    mixed_words = mix_bits(mix_bits(words) ^ mix_bits(mix_bits(position.astype(np.uint64) + np.uint64(1))))
    hashes = np.zeros(len(lengths), np.uint64)
    filled = n_words > 0
    hashes[filled] = np.add.reduceat(mixed_words, (ends - n_words)[filled])
    hashes += mix_bits(lengths.astype(np.uint64))
    return np.where(filled, hashes | np.uint64(1), np.uint64(0))  # the lowest bit keeps the hash of a text from being 0


def as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values as large_string; nulls stay null, and NaN becomes null."""
    if pa.types.is_floating(column.type):  # pandas writes NaN where a number is missing
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        return column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # Arrow has no cast to text for lists and structs
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.large_string())])
