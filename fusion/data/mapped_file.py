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
        """Starts to read these rows [n] from disk, without waiting for them; only where the system can."""
        if not hasattr(os, "posix_fadvise"):
            return
        # Not `mmap.madvise`, which keeps Python's global lock while the kernel queues the reads.
        for start in (rows * self._row_bytes).tolist():
            os.posix_fadvise(self._file, start, self._row_bytes, os.POSIX_FADV_WILLNEED)
