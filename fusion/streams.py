"""Standard output and error that never fail: what only shows must not decide how a command ends.

A reader that has left (`| head`), a closed stream (`2>&-`), a full disk, a terminal that is gone or an encoding that
lacks a letter: the text is lost, and the work goes on.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

# OSError: nobody reads, no space, no terminal. ValueError: the stream is closed.
LOST = (OSError, ValueError)
STDIN, STDOUT, STDERR = 0, 1, 2


class Unfailing(io.TextIOBase):
    """A text stream on top of `stream`; what cannot be written is dropped, and letters it lacks become `?`."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def buffer(self) -> IO[bytes]:
        """The bytes below; writing to them can fail."""
        return io.BytesIO() if self._stream is None else self._stream.buffer  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        with suppress(*LOST):
            if self._stream is not None:
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(*LOST):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        with suppress(*LOST):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("there is no such stream")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True


@contextmanager
def unfailing() -> Iterator[None]:
    """Inside, whatever is printed, cannot fail; nor can the flush when Python ends afterwards."""
    if isinstance(sys.stdout, Unfailing):
        yield
        return
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unfailing(before[0]), Unfailing(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for number, stream in zip((STDOUT, STDERR), before, strict=True):
            _settle(number, stream)


def _open_closed() -> None:
    """Opens /dev/null in place of each closed standard stream, or the next file would get its number, and its text."""
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            assert os.open(os.devnull, os.O_RDWR) == number, "the lowest free number is taken"
            os.set_inheritable(number, True)  # for the processes that this one starts


def _settle(number: int, stream: IO[str] | None) -> None:
    """Flushes a stream; one that cannot be written goes to /dev/null, as Python's own flush would end it with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except LOST:
        with suppress(*LOST):
            if stream.fileno() == number:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
