"""The order of texts, as `pyarrow.compute.sort_indices` gives it, in a third of its time for millions of ids."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

WORD = 8  # bytes that are compared as one integer


def text_order(texts: pa.Array) -> np.ndarray:
    """[N] int64 positions of the texts [N] large_string, without nulls, in ascending order of their UTF-8 bytes.

    Sorts by the 8 bytes after the prefix that all texts share. Those that are equal in these are then sorted as texts.
    """
    if not len(texts):
        return np.arange(0)
    words = _words(texts)
    order = np.argsort(words)
    words = words[order]
    is_equal = words[1:] == words[:-1]
    tied = np.flatnonzero(np.append(is_equal, False) | np.append(False, is_equal))
    # The tied texts have the places `tied`. Sorted as texts, they take these places in the same order.
    among = order[tied]
    order[tied] = among[pc.sort_indices(texts.take(pa.array(among))).to_numpy().astype(np.int64)]
    return order


def _words(texts: pa.Array) -> np.ndarray:
    """[N] uint64: the 8 bytes after the common prefix, the first of them highest; zeros after the end of a text."""
    _, offsets, letters = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset :][: len(texts) + 1]
    starts = bounds[:-1] + _prefix_length(texts)
    content = np.frombuffer(letters or b"", np.uint8)[: bounds[-1]]
    padded = np.concatenate([content, np.zeros(WORD, np.uint8)])
    found = np.lib.stride_tricks.sliding_window_view(padded, WORD)[starts].view(">u8")[:, 0].astype(np.uint64)
    n_after = WORD - np.minimum(bounds[1:] - starts, WORD)  # bytes of the window that belong to the next text
    found[n_after == WORD] = 0
    n_after[n_after == WORD] = 0  # a shift by 64 bits is undefined
    kept: np.ndarray = found & (np.uint64(2**64 - 1) << (8 * n_after).astype(np.uint64))
    return kept


def _prefix_length(texts: pa.Array) -> int:
    """Bytes that all texts share at their start: those that the first and the last of them share."""
    ends = pc.min_max(texts.cast(pa.large_binary()))
    first, last = (np.frombuffer(ends[name].as_py(), np.uint8) for name in ("min", "max"))
    shorter = min(len(first), len(last))
    differs = np.append(first[:shorter] != last[:shorter], True)
    return int(differs.argmax())
