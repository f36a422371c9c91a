"""Files as tensors, whose pages the kernel reads when they are used and drops when it needs the memory."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# Rows between those that are expected are read too if they are fewer bytes than this, since disks take longer for
# another read than for so many bytes. With random rows of a file larger than the memory, such gaps are rare.
GAP_BYTES = 1 << 15
REQUEST_BYTES = 1 << 17  # Linux reads no more than a device's read-ahead per request, which is 128 KiB by default


class MappedFile:
    """A file of N rows of one length, mapped into memory.

    Attributes:
        tensor: [N, …] the rows. Changes stay in this process, unless the file is `writable`.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, writable: bool = False) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
        self._file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._map = mmap.mmap(self._file, math.prod(shape) * dtype.itemsize, access=access)
        self.tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)
        self._row_bytes = self.tensor[:1].nbytes

    @contextmanager
    def used_at_random(self) -> Iterator[None]:
        """Within this context, the kernel does not read the pages around one that is used."""
        self._map.madvise(mmap.MADV_RANDOM)
        try:
            yield
        finally:
            self._map.madvise(mmap.MADV_NORMAL)

    def expect(self, rows: Tensor) -> None:
        """Starts to read these rows [n] from disk, without waiting for them; only where the system can.

        Args:
            rows: ascending.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        # Not `mmap.madvise`, which keeps Python's global lock while the kernel queues the reads.
        for start, end in self._runs(rows):
            for at in range(start, end, REQUEST_BYTES):
                os.posix_fadvise(self._file, at, min(REQUEST_BYTES, end - at), os.POSIX_FADV_WILLNEED)

    def _runs(self, rows: Tensor) -> list[tuple[int, int]]:
        """First and last byte (exclusive) of each run of rows between which there are only small gaps."""
        starts, ends = rows * self._row_bytes, (rows + 1) * self._row_bytes
        is_gap = starts[1:] - ends[:-1] > GAP_BYTES
        first, last = torch.cat([starts[:1], starts[1:][is_gap]]), torch.cat([ends[:-1][is_gap], ends[-1:]])
        return list(zip(first.tolist(), last.tolist(), strict=True))
